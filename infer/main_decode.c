/* lsa-decode: proves an exported indexer on a teacher. */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "infer/bench.h"
#include "infer/generate.h"
#include "infer/report.h"
#include "infer/vocab.h"
#include "kernels/core/cli.h"
#include "kernels/core/file.h"
#include "kernels/core/hash.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"

static lsa_status parse_budgets(lsa_validate_opts *o, const char *text, lsa_err *err) {
    for (const char *p = text;;) {
        char *end;
        const double v = strtod(p, &end);
        if (end == p || (*end && *end != ',') || !(v > 0 && v <= 1) || o->n_budget == LSA_MAX_BUDGET)
            LSA_RET_FAIL(
                LSA_E_ARG,
                "--budget '%s': expected at most %d fractions in (0, 1] with commas between, such as 0.05,0.10",
                text, LSA_MAX_BUDGET);
        o->budget[o->n_budget++] = v;
        if (!*end) return LSA_OK;
        p = end + 1;
    }
}

static lsa_status parse_storage(lsa_validate_opts *o, const char *name, int64_t page, lsa_err *err) {
    static const char *const known[] = {"f32", "server", "tiered"};
    int k = 0;
    while (k < 3 && strcmp(name, known[k])) k++;
    if (k == 3) LSA_RET_FAIL(LSA_E_ARG, "--storage '%s': expected f32, server or tiered", name);
    if (k > 0 && !o->gpu) LSA_RET_FAIL(LSA_E_ARG, "--storage %s is of a GPU: add --device cuda", name);
    if (page < 1 || page > 65536)
        LSA_RET_FAIL(LSA_E_ARG, "--page %lld: expected chunks in [1, 65536]", (long long)page);
    o->storage = (lsa_gpu_storage)k;
    o->page = (int32_t)page;
    return LSA_OK;
}

/* NULL: on the CPU, which auto means. */
static lsa_status open_device(lsa_ctx **gpu, const char *device, lsa_err *err) {
    *gpu = NULL;
    if (!strcmp(device, "auto") || !strcmp(device, "cpu")) return LSA_OK;
    if (strncmp(device, "cuda", 4))
        LSA_RET_FAIL(LSA_E_ARG, "--device '%s': expected auto, cpu, cuda or cuda:N", device);
    return lsa_ctx_create(gpu, device, err);
}

static lsa_status check_device(const char *device, lsa_err *err) {
    if (strcmp(device, "auto") && strcmp(device, "cpu"))
        LSA_RET_FAIL(LSA_E_DEVICE,
                     "--device %s: generate runs on the CPU only in this version; use --device cpu", device);
    return LSA_OK;
}

static lsa_status open_teacher(lsa_engine **e, const char *dir, lsa_err *err) {
    const lsa_status st = lsa_engine_open(e, dir, NULL, err);
    if (st == LSA_OK && *lsa_teacher_note(lsa_engine_teacher(*e)))
        lsa_warn("%s", lsa_teacher_note(lsa_engine_teacher(*e)));
    return st;
}

static void check_teacher(const lsa_indexer_file *f, const lsa_engine *e) {
    char hex[17];
    const char *want = json_string_value(json_object_get(f->train, "teacher_hash"));
    lsa_hex64(hex, lsa_teacher_hash(lsa_engine_teacher(e)));
    if (want && strcmp(want, hex))
        lsa_warn("the indexer was trained on teacher %s, this one is %s: same shapes, other weights", want,
                 hex);
}

static lsa_status cmd_validate(int argc, char **argv, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_validate_opts o = {.tau = 64, .tail = 256, .threshold = -1, .seed = 1, .logits_mib = 4096};
    const char *teacher = NULL, *tokens = NULL, *needs = NULL, *documents = NULL, *indexer = NULL,
               *policy = "full,lsa,recency", *budget = "0.10", *report = NULL, *device = "auto",
               *storage = "f32";
    int64_t seed = 1, page = 1;
    bool json = false;
    const lsa_opt opts[] = {
        {"teacher", "DIR", LSA_OPT_STR, &teacher, "folder with config.json and safetensors"},
        {"tokens", "FILE", LSA_OPT_STR, &tokens, "token ids: .u16, .u32 or .jsonl"},
        {"needs", "FILE", LSA_OPT_STR, &needs, "index of planted needs (planted files always need it)"},
        {"documents", "A:B", LSA_OPT_STR, &documents, "half-open range of documents, from 0 (default: all)"},
        {"indexer", "INDEXER", LSA_OPT_STR, &indexer, "exported indexer, for policy lsa"},
        {"policy", "LIST", LSA_OPT_STR, &policy,
         "full,dense,lsa,oracle,recency,random,untrained,last,last-spread (default full,lsa,recency)"},
        {"budget", "LIST", LSA_OPT_STR, &budget,
         "fractions of the evictable chunks that stay (default 0.10)"},
        {"threshold", "X", LSA_OPT_F64, &o.threshold,
         "lsa and untrained keep chunks whose sigmoid exceeds this, instead of a budget"},
        {"top-k", "K", LSA_OPT_I64, &o.top_k, "lsa and untrained keep this many chunks, instead of a budget"},
        {"tau", "N", LSA_OPT_I64, &o.tau, "tokens a window lasts (default 64)"},
        {"tail", "N", LSA_OPT_I64, &o.tail, "newest tokens that are always resident (default 256)"},
        {"sink", "N", LSA_OPT_I64, &o.sink, "first chunks that are always resident (default 0)"},
        {"seed", "N", LSA_OPT_I64, &seed, "of the random policy and the untrained indexer (default 1)"},
        {"logits-mib", "N", LSA_OPT_I64, &o.logits_mib,
         "memory for the full run's logits; KL is left out beyond it (default 4096)"},
        {"report", "DIR", LSA_OPT_STR, &report, "write report.json and report.html there"},
        {"device", "auto|cpu|cuda[:N]", LSA_OPT_STR, &device, "where to decode (auto: the CPU)"},
        {"storage", "f32|server|tiered", LSA_OPT_STR, &storage,
         "on a GPU, compressed rows and index keys: f32 there (default), in a server's codecs there, or these in host memory with a reserve there"},
        {"page", "N", LSA_OPT_I64, &page, "tiered: chunks that move together (default 1)"},
        {"json", NULL, LSA_OPT_FLAG, &json, "one JSON line per policy and budget instead of the table"},
        {0}};
    lsa_engine *e = NULL;
    lsa_docs *d = NULL;
    lsa_indexer_file f = {0};
    lsa_validation v = {0};
    lsa_cli_parse(
        "Run documents through the teacher under several policies of what stays resident, and compare.", "",
        opts, argc, argv, NULL, 0);
    if (!teacher || !tokens) LSA_FAIL(LSA_E_ARG, "--teacher and --tokens are required; see --help");
    if (o.tau < 1 || o.tau > LSA_MAX_TAU || o.tail < 0 || o.sink < 0 || o.top_k < 0 || o.threshold > 1)
        LSA_FAIL(
            LSA_E_ARG,
            "--tau must be in [1, 4096], --tail, --sink and --top-k not negative, --threshold at most 1");
    if (o.top_k > 0 && o.threshold >= 0) LSA_FAIL(LSA_E_ARG, "--top-k and --threshold exclude each other");
    o.seed = (uint64_t)seed;
    LSA_TRY(open_device(&o.gpu, device, err));
    LSA_TRY(parse_storage(&o, storage, page, err));
    LSA_TRY(lsa_policy_parse(o.policy, policy, err));
    LSA_TRY(parse_budgets(&o, budget, err));
    if (o.policy[LSA_POLICY_LSA] && !indexer) LSA_FAIL(LSA_E_ARG, "policy lsa needs --indexer");
    if (indexer) LSA_TRY(lsa_indexer_file_load(&f, indexer, err));
    LSA_TRY(open_teacher(&e, teacher, err));
    LSA_TRY(lsa_docs_open(&d, tokens, needs, documents, lsa_engine_config(e)->vocab, err));
    if (indexer) check_teacher(&f, e);
    LSA_TRY(lsa_validate(&v, e, d, indexer ? &f : NULL, &o, err));
    if (json) {
        const lsa_result *full = NULL;
        for (int i = 0; i < v.n; i++)
            if (v.row[i].policy == LSA_POLICY_FULL) full = &v.row[i];
        for (int i = 0; i < v.n; i++) {
            json_t *row = lsa_report_row(&v.row[i], full);
            char *text = json_dumps(row, JSON_REAL_PRECISION(9));
            puts(text ? text : "null");
            free(text);
            json_decref(row);
        }
    } else {
        lsa_report_table(&v);
    }
    if (report) {
        int64_t longest = 0;
        for (int64_t i = 0; i < lsa_docs_count(d); i++)
            if (lsa_docs_at(d, i)->n_token > longest) longest = lsa_docs_at(d, i)->n_token;
        const lsa_report_about about = {
            lsa_teacher_name(lsa_engine_teacher(e)), tokens, indexer, lsa_docs_count(d), longest, &o};
        LSA_TRY(lsa_report_write(&v, &about, report, err));
        lsa_info("wrote %s/report.html and report.json", report);
    }
done:
    lsa_validation_fini(&v);
    lsa_docs_close(d);
    lsa_engine_close(e);
    lsa_ctx_destroy(o.gpu);
    lsa_indexer_file_fini(&f);
    return st;
}

static void print_text(const lsa_vocab *v, const int32_t *token, int64_t n) {
    char buf[512];
    for (int64_t i = 0; i < n; i++) fwrite(buf, 1, lsa_vocab_bytes(v, token[i], buf, sizeof buf), stdout);
    printf("\n");
}

static lsa_status cmd_generate(int argc, char **argv, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_generate_opts o = {.n_prompt = 1024, .n_new = 64, .tau = 64, .tail = 256, .budget = 0.10};
    const char *teacher = NULL, *tokens = NULL, *needs = NULL, *documents = "0:1", *indexer = NULL,
               *policy = NULL, *device = "auto";
    bool json = false;
    const lsa_opt opts[] = {
        {"teacher", "DIR", LSA_OPT_STR, &teacher, "folder with config.json, safetensors and tokenizer.json"},
        {"tokens", "FILE", LSA_OPT_STR, &tokens, "token ids: .u16, .u32 or .jsonl"},
        {"needs", "FILE", LSA_OPT_STR, &needs, "index of planted needs"},
        {"documents", "I:I+1", LSA_OPT_STR, &documents,
         "the document whose beginning is the prompt (default 0:1)"},
        {"prompt", "N", LSA_OPT_I64, &o.n_prompt, "tokens of the prompt (default 1024)"},
        {"new", "N", LSA_OPT_I64, &o.n_new, "tokens to generate (default 64)"},
        {"indexer", "INDEXER", LSA_OPT_STR, &indexer, "exported indexer"},
        {"policy", "full|lsa", LSA_OPT_STR, &policy, "default: lsa with --indexer, full without"},
        {"budget", "X", LSA_OPT_F64, &o.budget, "fraction of the evictable chunks that stay (default 0.10)"},
        {"tau", "N", LSA_OPT_I64, &o.tau, "tokens between decisions (default 64)"},
        {"tail", "N", LSA_OPT_I64, &o.tail, "newest tokens that are always resident (default 256)"},
        {"sink", "N", LSA_OPT_I64, &o.sink, "first chunks that are always resident (default 0)"},
        {"device", "auto|cpu", LSA_OPT_STR, &device, "where to decode (default auto)"},
        {"json", NULL, LSA_OPT_FLAG, &json, "machine-readable"},
        {0}};
    lsa_engine *e = NULL;
    lsa_docs *d = NULL;
    lsa_indexer_file f = {0};
    lsa_generation g = {0};
    lsa_vocab *vocab = NULL;
    char path[LSA_PATH_MAX];
    lsa_cli_parse("Generate greedily after the beginning of a document.", "", opts, argc, argv, NULL, 0);
    if (!teacher || !tokens) LSA_FAIL(LSA_E_ARG, "--teacher and --tokens are required; see --help");
    if (policy && strcmp(policy, "full") && strcmp(policy, "lsa"))
        LSA_FAIL(LSA_E_ARG, "--policy '%s': expected full or lsa", policy);
    o.full = policy ? !strcmp(policy, "full") : !indexer;
    if (!o.full && !indexer) LSA_FAIL(LSA_E_ARG, "policy lsa needs --indexer");
    if (!(o.budget > 0 && o.budget <= 1) || o.tau < 1 || o.tail < 0 || o.sink < 0)
        LSA_FAIL(LSA_E_ARG, "--budget must be in (0, 1], --tau at least 1, --tail and --sink not negative");
    LSA_TRY(check_device(device, err));
    if (!o.full) LSA_TRY(lsa_indexer_file_load(&f, indexer, err));
    LSA_TRY(open_teacher(&e, teacher, err));
    LSA_TRY(lsa_docs_open(&d, tokens, needs, documents, lsa_engine_config(e)->vocab, err));
    const lsa_doc *doc = lsa_docs_at(d, 0);
    if (o.n_prompt > doc->n_token)
        LSA_FAIL(LSA_E_ARG, "--prompt %lld exceeds the document's %lld tokens", (long long)o.n_prompt,
                 (long long)doc->n_token);
    if (!o.full) check_teacher(&f, e);
    LSA_TRY(lsa_generate(&g, e, o.full ? NULL : &f, doc->token, &o, err));
    if (json) {
        printf(
            "{\"policy\": \"%s\", \"prompt\": %lld, \"kept\": %.6f, \"decisions\": %lld, \"misses\": %lld, \"prefill_tokens_per_s\": %.1f, \"tokens_per_s\": %.1f, \"tokens\": [",
            o.full ? "full" : "lsa", (long long)o.n_prompt, g.kept_frac, (long long)g.decisions,
            (long long)g.misses, (double)o.n_prompt / (g.prefill_s + 1e-9),
            (double)g.n / (g.decode_s + 1e-9));
        for (int64_t i = 0; i < g.n; i++) printf("%s%d", i ? ", " : "", g.token[i]);
        printf("]}\n");
        goto done;
    }
    LSA_TRY(lsa_path(path, err, "%s/tokenizer.json", teacher));
    if (lsa_exists(path)) {
        LSA_TRY(lsa_vocab_open(&vocab, path, err));
        const int64_t shown = o.n_prompt < 64 ? o.n_prompt : 64;
        printf("... ");
        print_text(vocab, doc->token + o.n_prompt - shown, shown);
        printf("==> ");
        print_text(vocab, g.token, g.n);
    } else {
        for (int64_t i = 0; i < g.n; i++) printf("%d%s", g.token[i], i + 1 < g.n ? " " : "\n");
    }
    lsa_info(
        "%s: %lld tokens after a prompt of %lld, %.0f tokens/s; %.1f %% of the evictable chunks resident, %lld decisions, %lld misses",
        o.full ? "full" : "lsa", (long long)g.n, (long long)o.n_prompt, (double)g.n / (g.decode_s + 1e-9),
        100 * g.kept_frac, (long long)g.decisions, (long long)g.misses);
done:
    lsa_vocab_close(vocab);
    lsa_generation_fini(&g);
    lsa_docs_close(d);
    lsa_engine_close(e);
    lsa_indexer_file_fini(&f);
    return st;
}

/* Ascending numbers in [lo, hi], multiples of `unit`. */
static lsa_status parse_list(int64_t *out, int32_t *n, const char *option, const char *text, int64_t lo,
                             int64_t hi, int64_t unit, lsa_err *err) {
    for (const char *p = text;;) {
        char *end;
        const long long v = strtoll(p, &end, 10);
        if (end == p || (*end && *end != ',') || v < lo || v > hi || v % unit || *n == LSA_BENCH_LIST ||
            (*n && v <= out[*n - 1]))
            LSA_RET_FAIL(
                LSA_E_ARG,
                "%s '%s': expected at most %d ascending multiples of %lld in [%lld, %lld] with commas "
                "between",
                option, text, LSA_BENCH_LIST, (long long)unit, (long long)lo, (long long)hi);
        out[(*n)++] = v;
        if (!*end) return LSA_OK;
        p = end + 1;
    }
}

static lsa_status cmd_bench(int argc, char **argv, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_bench_opts o = {.budget = 0.085, .pool_gb = 12.2};
    const char *config = NULL, *context = "65536,131072,262144,524288,1048576", *batch = "1,8,32,128",
               *device = "cuda";
    lsa_teacher_config *c = NULL;
    lsa_ctx *ctx = NULL;
    const lsa_opt opts[] = {
        {"config", "FILE", LSA_OPT_STR, &config, "config.json of a DeepSeek-V4 model; no weights are needed"},
        {"context", "LIST", LSA_OPT_STR, &context, "tokens (default 65536,131072,262144,524288,1048576)"},
        {"batch", "LIST", LSA_OPT_STR, &batch, "requests (default 1,8,32,128; what does not fit is said)"},
        {"budget", "X", LSA_OPT_F64, &o.budget,
         "fraction of all chunks that has a place on the GPU: tail, sink and staging included (default 0.085)"},
        {"pool-gb", "X", LSA_OPT_F64, &o.pool_gb,
         "GPU memory for caches, in 10^9 bytes, that the last part fills with requests of the longest context (default 12.2; 0: leave it out)"},
        {"device", "cuda[:N]", LSA_OPT_STR, &device, "which GPU (default cuda)"},
        {"json", NULL, LSA_OPT_FLAG, &o.json, "one JSON line per case instead of the table"},
        {0}};
    lsa_cli_parse(
        "Time and GPU bytes of a decode step's attention path, full against Lookahead Sparse Attention, on synthetic caches in a server's codecs. Attention and indexers of all layers run; projections and experts are left out.",
        "", opts, argc, argv, NULL, 0);
    if (!config) LSA_FAIL(LSA_E_ARG, "--config is required; see --help");
    if (!(o.budget > 0 && o.budget <= 1)) LSA_FAIL(LSA_E_ARG, "--budget must be in (0, 1]");
    if (!(o.pool_gb >= 0)) LSA_FAIL(LSA_E_ARG, "--pool-gb must not be negative");
    if (strncmp(device, "cuda", 4))
        LSA_FAIL(LSA_E_ARG, "--device '%s': bench measures a GPU; expected cuda or cuda:N", device);
    LSA_TRY(parse_list(o.context, &o.n_context, "--context", context, 1024, 1 << 23, 256, err));
    LSA_TRY(parse_list(o.batch, &o.n_batch, "--batch", batch, 1, 1024, 1, err));
    LSA_TRY(LSA_NEW(c, 1, err));
    LSA_TRY(lsa_teacher_config_load(c, config, err));
    st = lsa_ctx_create(&ctx, device, err);
    if (st != LSA_OK) lsa_err_wrap(err, "bench measures a GPU and has no CPU form");
    LSA_TRY(st);
    LSA_TRY(lsa_bench(ctx, c, &o, err));
done:
    lsa_ctx_destroy(ctx);
    lsa_free(c);
    return st;
}

int main(int argc, char **argv) {
    static const lsa_subcommand subs[] = {
        {"validate", "compare policies of what stays resident", cmd_validate},
        {"generate", "generate text with full or sparse attention", cmd_generate},
        {"bench", "time and GPU memory of a decode step's attention, full against sparse", cmd_bench},
        {0}};
    return lsa_cli_main("lsa-decode", "sparse-attention decoder that proves an exported indexer", subs, argc,
                        argv);
}
