/* lsa-dump: teacher -> shards. */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/dump/bench.h"
#include "data/dump/import.h"
#include "data/dump/inputs.h"
#include "data/dump/recheck.h"
#include "data/dump/run.h"
#include "data/dump/synth.h"
#include "data/h5.h"
#include "kernels/core/cli.h"
#include "kernels/core/hash.h"
#include "kernels/core/log.h"
#include "kernels/core/num.h"

/* Options of run and plan; teacher, tokens and out are required. */
#define DUMP_OPTS(o)                                                                                         \
    {"teacher", "DIR", LSA_OPT_STR, &(o).teacher, "folder with config.json and safetensors"},                \
        {"tokens", "FILE", LSA_OPT_STR, &(o).tokens, "token ids: .u16, .u32 (little-endian) or .jsonl"},     \
        {"needs", "FILE", LSA_OPT_STR, &(o).needs,                                                           \
         "index of planted needs: cuts the documents (planted files always need it)"},                       \
        {"documents", "A:B", LSA_OPT_STR, &(o).documents,                                                    \
         "half-open range of documents, from 0 (default: all)"},                                             \
        {"top-p", "P", LSA_OPT_F64, &(o).top_p,                                                              \
         "votes: smallest prefix of the pool's softmax above this mass (default 0.6)"},                      \
        {"pool", "N", LSA_OPT_I64, &(o).pool,                                                                \
         "votes: how many of the highest native logits form the pool (default: index_topk)"},                \
        {"hidden-stride", "N", LSA_OPT_I64, &(o).hidden_stride,                                              \
         "keep hidden vectors of every Nth token (default 64; 1 for reference mode)"},                       \
        {"layers", "LIST", LSA_OPT_STR, &(o).layers,                                                         \
         "CSA ordinals whose keys and hidden vectors are kept: all, or 0,2 (default all)"},                  \
        {"no-stats", NULL, LSA_OPT_FLAG, &(o).no_stats,                                                      \
         "leave out native logits and masses (KL training and captured mass then are refused)"},             \
        {"dense-every", "N", LSA_OPT_I64, &(o).dense_every,                                                  \
         "also the dense mass of every Nth token (default 0: none)"},                                        \
        {"dense-min", "MASS", LSA_OPT_F64, &(o).dense_min,                                                   \
         "dense entries below this are summed into 'rest' (default 1e-4)"},                                  \
        {"shard-bytes", "SIZE", LSA_OPT_SIZE, &(o).shard_bytes,                                              \
         "a shard closes at the first document end past this size (default 256M)"},                          \
        {"host-budget", "SIZE", LSA_OPT_SIZE, &(o).host_budget,                                              \
         "refuse what may need more host memory (default: this machine's)"},                                 \
        {"streams", "TYPE", LSA_OPT_STR, &(o).streams,                                                       \
         "with --stream: f32, or bf16 to halve what travels between two layers, rounded "                    \
         "after each (default f32)"},                                                                        \
        {"sim-fp8", NULL, LSA_OPT_FLAG, &(o).sim_fp8, "simulate the fp8 KV cache"}, {                        \
        "sim-fp4", NULL, LSA_OPT_FLAG, &(o).sim_fp4, "simulate the fp4 indexer"                              \
    }

static const char *const DEVICE_HELP = "where the teacher runs: cpu, cuda or cuda:N (default cpu)";

static const char *const STREAM_HELP =
    "with cuda: the weights pass through the GPU layer by layer, a wave of documents each time (default: if they "
    "do not fit its memory); the numbers are the same";
static const char *const STREAMS_DIR_HELP =
    "with --stream: keep the wave between two layers in a file in this folder (default: in pinned memory)";
static const char *const WAVE_HELP =
    "with --stream: tokens that pass a layer together (default: what the host budget holds)";

static lsa_status need_inputs(const lsa_dump_opts *o, const char *out, lsa_err *err) {
    if (!o->teacher || !o->tokens || !out)
        LSA_RET_FAIL(LSA_E_ARG, "--teacher, --tokens and --out are required; see --help");
    return LSA_OK;
}

static lsa_status cmd_run(int argc, char **argv, lsa_err *err) {
    lsa_dump_opts o = lsa_dump_defaults();
    const char *out = NULL, *device = "cpu";
    bool dry = false, json = false;
    const lsa_opt opts[] = {DUMP_OPTS(o),
                            {"out", "SHARDS", LSA_OPT_STR, &out, "folder to write"},
                            {"device", "DEVICE", LSA_OPT_STR, &device, DEVICE_HELP},
                            {"stream", NULL, LSA_OPT_FLAG, &o.stream, STREAM_HELP},
                            {"wave-tokens", "N", LSA_OPT_I64, &o.wave_tokens, WAVE_HELP},
                            {"streams-dir", "DIR", LSA_OPT_STR, &o.streams_dir, STREAMS_DIR_HELP},
                            {"dry-run", NULL, LSA_OPT_FLAG, &dry, "print the plan and stop"},
                            {"json", NULL, LSA_OPT_FLAG, &json,
                             "print the plan as a line of JSON, and a second one of where the seconds went"},
                            {0}};
    lsa_dump_plan plan;
    lsa_dump_times times;
    lsa_cli_parse("Read documents through the teacher and write what its attention needed.", "", opts, argc,
                  argv, NULL, 0);
    lsa_status st = need_inputs(&o, out, err);
    if (st == LSA_OK) st = lsa_dump_run(&o, out, device, dry, &plan, &times, err);
    if (st == LSA_OK && json) st = lsa_dump_print_plan_json(&plan, true, err);
    if (st == LSA_OK && json && !dry) st = lsa_dump_print_times_json(&times, err);
    return st;
}

static lsa_status cmd_plan(int argc, char **argv, lsa_err *err) {
    lsa_dump_opts o = lsa_dump_defaults();
    const char *out = ".", *lengths = NULL;
    bool json = false;
    const lsa_opt opts[] = {
        DUMP_OPTS(o),
        {"lengths", "LIST", LSA_OPT_STR, &lengths,
         "instead of --tokens: how many documents of how many tokens, like 200x16384,8x1048576"},
        {"out", "SHARDS", LSA_OPT_STR, &out, "folder whose disk is checked (default: here)"},
        {"json", NULL, LSA_OPT_FLAG, &json, "machine-readable"},
        {0}};
    lsa_cli_parse(
        "Say what a dump will take, from config.json and the documents, and refuse what does not fit. Nothing is written; weights are loaded only to measure the speed, if they are there.",
        "", opts, argc, argv, NULL, 0);
    if (!o.teacher || !o.tokens == !lengths)
        LSA_RET_FAIL(LSA_E_ARG, "--teacher and one of --tokens and --lengths are required; see --help");
    if (lengths && (o.needs || o.documents))
        LSA_RET_FAIL(LSA_E_ARG, "--needs and --documents belong to --tokens, not to --lengths");
    return lsa_dump_plan_command(&o, lengths, out, json, err);
}

static lsa_status cmd_resume(int argc, char **argv, lsa_err *err) {
    const char *dir, *device = "cpu";
    lsa_dump_opts how = lsa_dump_defaults();
    const lsa_opt opts[] = {{"device", "DEVICE", LSA_OPT_STR, &device, DEVICE_HELP},
                            {"stream", NULL, LSA_OPT_FLAG, &how.stream, STREAM_HELP},
                            {"wave-tokens", "N", LSA_OPT_I64, &how.wave_tokens, WAVE_HELP},
                            {"streams-dir", "DIR", LSA_OPT_STR, &how.streams_dir, STREAMS_DIR_HELP},
                            {"host-budget", "SIZE", LSA_OPT_SIZE, &how.host_budget, "as in run"},
                            {0}};
    bool imported;
    lsa_cli_parse("Go on with an interrupted dump or import from its last sealed shard.", "SHARDS", opts,
                  argc, argv, &dir, 1);
    const lsa_status st = lsa_import_made(&imported, dir, err);
    if (st != LSA_OK) return st;
    return imported ? lsa_import_resume(dir, err) : lsa_dump_resume(dir, device, &how, err);
}

static lsa_status cmd_import(int argc, char **argv, lsa_err *err) {
    lsa_import_opts o = lsa_import_defaults();
    const char *out = NULL;
    const lsa_opt opts[] = {
        {"from", "SOURCE", LSA_OPT_MULTI, &o.from,
         "folder of FlashMemory doc_*.pkl, one such file, or an lsa-import/1 .jsonl; may be repeated"},
        {"teacher", "DIR", LSA_OPT_STR, &o.teacher,
         "folder with config.json of the recorded model (its weights are not needed)"},
        {"out", "SHARDS", LSA_OPT_STR, &out, "folder to write"},
        {"top-p", "P", LSA_OPT_F64, &o.top_p, "label rule of recorded votes: prefix mass (default 0.6)"},
        {"pool", "N", LSA_OPT_I64, &o.pool, "label rule of recorded votes: pool (default: index_topk)"},
        {"min-votes", "N", LSA_OPT_I64, &o.min_votes,
         "label rule of recorded votes: chunks with fewer were not recorded (default 3)"},
        {"hidden-stride", "N", LSA_OPT_I64, &o.hidden_stride,
         "keep hidden vectors of every Nth token (default 1, what reference mode needs)"},
        {"skip-bad", NULL, LSA_OPT_FLAG, &o.skip_bad,
         "leave out documents that fail a check, naming each, instead of stopping at the first"},
        {"shard-bytes", "SIZE", LSA_OPT_SIZE, &o.shard_bytes, "as in run (default 256M)"},
        {0}};
    lsa_cli_parse(
        "Make shards of what other tools recorded: FlashMemory pickles (read without Python, nothing in them is "
        "run), or engine responses laid out as data/IMPORT_FORMAT.md says. They hold votes, not /stats: train on "
        "them with recipes/reference.yaml, or with loss.kind focal or bce.",
        "", opts, argc, argv, NULL, 0);
    if (o.from.n == 0 || !o.teacher || !out)
        LSA_RET_FAIL(LSA_E_ARG, "--from, --teacher and --out are required; see --help");
    return lsa_import_run(&o, out, err);
}

static lsa_status cmd_synth(int argc, char **argv, lsa_err *err) {
    lsa_synth_opts o = lsa_synth_defaults();
    const char *out = NULL;
    const lsa_opt opts[] = {
        {"out", "SHARDS", LSA_OPT_STR, &out, "folder to write"},
        {"docs", "N", LSA_OPT_I64, &o.docs, "documents (default 16)"},
        {"tokens", "N", LSA_OPT_I64, &o.tokens, "tokens per document (default 2048)"},
        {"layers", "N", LSA_OPT_I64, &o.layers, "CSA layers (default 3)"},
        {"hidden", "N", LSA_OPT_I64, &o.hidden, "width of hidden vectors (default 64)"},
        {"topics", "N", LSA_OPT_I64, &o.topics, "topics (default 24)"},
        {"hidden-stride", "N", LSA_OPT_I64, &o.hidden_stride, "as in run (default 64)"},
        {"noise", "SIGMA", LSA_OPT_F64, &o.noise, "noise on keys and hidden vectors (default 0.05)"},
        {"shard-bytes", "SIZE", LSA_OPT_SIZE, &o.shard_bytes, "as in run (default 256M)"},
        {"seed", "N", LSA_OPT_I64, &o.seed, "seed (default 1)"},
        {0}};
    lsa_cli_parse("Write shards of a made-up teacher whose golden chunks are known (golden.jsonl).", "", opts,
                  argc, argv, NULL, 0);
    if (!out) LSA_RET_FAIL(LSA_E_ARG, "--out is required; see --help");
    return lsa_synth(&o, out, err);
}

static lsa_status cmd_bench(int argc, char **argv, lsa_err *err) {
    lsa_layer_bench_opts o = {.device = "cuda",
                              .memory_cap = INT64_C(76) << 30,
                              .wave_tokens = INT64_C(1) << 20,
                              .source_rate = 5e9};
    double rate = 5;
    const lsa_opt opts[] = {
        {"config", "FILE", LSA_OPT_STR, &o.config, "config.json of the model; its weights are not needed"},
        {"device", "DEVICE", LSA_OPT_STR, &o.device, "cuda or cuda:N (default cuda)"},
        {"memory-cap", "SIZE", LSA_OPT_SIZE, &o.memory_cap, "most GPU memory to take (default 76G)"},
        {"chunk-tokens", "N", LSA_OPT_I64, &o.chunk,
         "tokens that pass a layer's kernels together (default: the most that fits, up to 32768)"},
        {"wave-tokens", "N", LSA_OPT_I64, &o.wave_tokens,
         "streaming test: tokens that pass a layer while the next one's weights are read (default 1048576; 0: none)"},
        {"source-rate", "GB/S", LSA_OPT_F64, &rate, "streaming test: how fast weights are read (default 5)"},
        {"json", NULL, LSA_OPT_FLAG, &o.json, "a line of JSON a case, and one for all"},
        {0}};
    lsa_cli_parse(
        "Measure the bf16 layer at a model's true size on this GPU, with made-up weights in their storage types: "
        "tokens/s by kind of layer at 32,768 and 131,072 tokens a document, and what follows for the whole model.",
        "", opts, argc, argv, NULL, 0);
    o.source_rate = rate * 1e9;
    if (!o.config) LSA_RET_FAIL(LSA_E_ARG, "--config is required; see --help");
    return lsa_layer_bench_command(&o, err);
}

static lsa_status cmd_verify(int argc, char **argv, lsa_err *err) {
    const char *dir;
    lsa_recheck_opts o = {.seed = -1};
    lsa_manifest m = {0};
    int64_t values = 0;
    const lsa_opt opts[] = {
        {"recheck", "N", LSA_OPT_I64, &o.n,
         "also read N random documents through the teacher again and compare every stored number, bit for bit"},
        {"seed", "N", LSA_OPT_I64, &o.seed, "which documents --recheck draws (default 1)"},
        {"device", "DEVICE", LSA_OPT_STR, &o.device,
         "where --recheck runs the teacher: the kind of device that made the dump, or last bits differ (default cpu)"},
        {"teacher", "DIR", LSA_OPT_STR, &o.teacher, "for --recheck, if the teacher was moved since the dump"},
        {"tokens", "FILE", LSA_OPT_STR, &o.tokens, "the same for the token file"},
        {"needs", "FILE", LSA_OPT_STR, &o.needs, "the same for the index of planted needs"},
        {0}};
    lsa_status st = LSA_OK;
    lsa_cli_parse(
        "Check a shard folder whole: hashes, structure, ranges, and native logits recomputed from the stored keys.",
        "SHARDS", opts, argc, argv, &dir, 1);
    if (o.n < 0) LSA_FAIL(LSA_E_ARG, "--recheck must not be negative");
    if (o.n == 0 && (o.seed >= 0 || o.device || o.teacher || o.tokens || o.needs))
        LSA_FAIL(LSA_E_ARG, "--seed, --device, --teacher, --tokens and --needs belong to --recheck N");
    if (o.seed < 0) o.seed = 1;
    LSA_TRY(lsa_shards_verify(dir, err));
    LSA_TRY(lsa_manifest_load(&m, dir, err));
    printf("ok: %lld shards, %lld documents, %lld tokens%s\n", (long long)m.info.n_shard,
           (long long)m.info.n_doc, (long long)m.info.n_token,
           m.complete ? "" : " (incomplete: 'lsa-dump resume' goes on)");
    if (o.n == 0) goto done;
    LSA_TRY(lsa_dump_recheck(&values, dir, &o, err));
    printf("ok: %lld documents (seed %lld) read again: %lld stored values equal, bit for bit\n",
           (long long)lsa_min_i64(o.n, m.info.n_doc), (long long)o.seed, (long long)values);
done:
    lsa_manifest_fini(&m);
    return st;
}

static lsa_status cmd_info(int argc, char **argv, lsa_err *err) {
    const char *dir;
    bool json = false;
    const lsa_opt opts[] = {{"json", NULL, LSA_OPT_FLAG, &json, "machine-readable"}, {0}};
    lsa_cli_parse("Say what a shard folder holds.", "SHARDS", opts, argc, argv, &dir, 1);
    lsa_manifest m;
    lsa_status st = lsa_manifest_load(&m, dir, err);
    if (st != LSA_OK) return st;
    const lsa_shards_info *f = &m.info;
    int64_t bytes = 0;
    for (int64_t i = 0; i < m.shard.len; i++) bytes += m.shard.data[i].bytes;
    if (json) {
        json_t *o = json_pack("{s:s, s:b, s:I, s:I, s:I, s:I, s:i, s:i, s:i, s:b, s:b, s:f, s:i, s:i}",
                              "teacher", f->teacher, "complete", m.complete, "shards", (json_int_t)f->n_shard,
                              "documents", (json_int_t)f->n_doc, "tokens", (json_int_t)f->n_token, "bytes",
                              (json_int_t)bytes, "csa_layers", f->n_csa, "hidden", f->hidden, "hidden_stride",
                              f->hidden_stride, "has_stats", f->has_stats, "has_dense", f->has_dense, "top_p",
                              f->label_top_p, "pool", f->label_pool, "min_votes", f->label_min_votes);
        char *text = o ? json_dumps(o, 0) : NULL;
        if (text)
            puts(text);
        else
            st = lsa_err_set(err, LSA_E_NOMEM, __FILE__, __LINE__, "cannot format the description of '%s'",
                             dir);
        free(text);
        json_decref(o);
    } else {
        char hex[17];
        lsa_hex64(hex, f->teacher_hash);
        printf(
            "teacher    %s (%s)\nstate      %s\nshards     %lld, %.1f MiB\ndocuments  %lld\ntokens     %lld\nhidden     %d wide, every %d tokens\n",
            f->teacher, hex, m.complete ? "complete" : "incomplete", (long long)f->n_shard,
            (double)bytes / 0x1p20, (long long)f->n_doc, (long long)f->n_token, f->hidden, f->hidden_stride);
        printf("votes      top-p %g over the %d highest logits", f->label_top_p, f->label_pool);
        if (f->label_min_votes > 1) printf(", chunks with at least %d", f->label_min_votes);
        if (json_object_get(m.run, "import")) {
            const char *kind = json_string_value(json_object_get(m.run, "hidden"));
            printf("\nimported   %lld labelled tokens, hidden vectors: %s", (long long)f->n_row,
                   kind ? kind : "none");
        }
        printf("\nstatistics %s%s\nlayers    ", f->has_stats ? "native" : "none",
               f->has_dense ? " and dense" : "");
        for (int32_t o = 0; o < f->n_csa; o++)
            printf(" c%d=%d%s", o, f->csa_id[o].v, f->has_keys[o] ? "" : " (votes only)");
        printf("\n");
    }
    lsa_manifest_fini(&m);
    return st;
}

int main(int argc, char **argv) {
    static const lsa_subcommand subs[] = {
        {"run", "read documents through a teacher, write shards", cmd_run},
        {"resume", "go on with an interrupted run or import", cmd_resume},
        {"import", "make shards of FlashMemory pickles or engine responses", cmd_import},
        {"synth", "shards of a made-up teacher with known golden chunks", cmd_synth},
        {"plan", "what a run will take", cmd_plan},
        {"bench", "what a full-size layer takes on this GPU", cmd_bench},
        {"verify", "check a shard folder", cmd_verify},
        {"info", "describe a shard folder", cmd_info},
        {0}};
    lsa_h5_init();
    return lsa_cli_main("lsa-dump", "DeepSeek-V4 attention statistics for training a memory indexer", subs,
                        argc, argv);
}
