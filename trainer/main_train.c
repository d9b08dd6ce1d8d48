/* lsa-train: shards -> checkpoint. */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "data/h5.h"
#include "kernels/comm/comm.h"
#include "kernels/core/cli.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"
#include "trainer/bench.h"
#include "trainer/estimate.h"
#include "trainer/run.h"

static const char *const DEVICE_HELP = "where to train: auto, cpu, cuda, cuda:N or ref (default auto)";

/* ---- ranks ---- */

typedef struct ranks {
    const char *kind;
    double deadline;
    lsa_comm *comm;
} ranks;
#define RANKS_DEFAULT                                                                                        \
    { "auto", 20, NULL }
#define RANKS_OPTS(r)                                                                                                                      \
    {"ranks", "KIND", LSA_OPT_STR, &(r).kind,                                                                                              \
     "auto: every process that mpirun or srun --mpi=pmix started is a rank; self: this process alone; mpi; "                               \
     "file:PATH: ranks that torchrun, srun or RANK and WORLD_SIZE number meet through this file, without MPI "                             \
     "(default auto)"},                                                                                                                    \
    {                                                                                                                                      \
        "deadline", "S", LSA_OPT_F64, &(r).deadline,                                                                                       \
            "seconds after which a rank that is silent or does not move ends the run; six times as long to meet at the start (default 20)" \
    }

static const char *variable(const char *name) {
    return getenv(name);
}
static void stuck(const lsa_err *err) {
    _exit(lsa_report_error("lsa-train", err));
}

static lsa_status ranks_open(ranks *r, lsa_err *err) {
    lsa_comm_opts o = {.ranks = r->kind, .deadline_s = r->deadline, .stuck = stuck};
    lsa_status st = lsa_launch_read(&o.launch, variable, err);
    if (st == LSA_OK) st = lsa_comm_open(&r->comm, &o, err);
    if (st == LSA_OK && lsa_comm_rank(r->comm) > 0) lsa_log_set_level(LSA_LOG_QUIET);
    return st;
}

/* Ends the ranks' work together; an error says which rank reports it. Of an interruption only rank 0 speaks,
 * and the others end with 0: a launcher kills the rest of a job as soon as one rank leaves with another code.
 */
static lsa_status ranks_close(ranks *r, lsa_status st, lsa_err *err) {
    const int rank = r->comm ? lsa_comm_rank(r->comm) : 0, size = r->comm ? lsa_comm_size(r->comm) : 1;
    lsa_comm_close(r->comm, st, err);
    if (st == LSA_E_INTERRUPTED && rank > 0) {
        *err = (lsa_err){0};
        return LSA_OK;
    }
    if (st != LSA_OK && size > 1) lsa_err_wrap(err, "rank %d", rank);
    return st;
}

static lsa_status cmd_run(int argc, char **argv, lsa_err *err) {
    const char *recipe = NULL, *data = NULL, *out = NULL, *init = NULL, *device = "auto";
    ranks w = RANKS_DEFAULT;
    lsa_multi set = {0};
    const lsa_opt opts[] = {
        {"recipe", "FILE", LSA_OPT_STR, &recipe,
         "YAML recipe (default: all defaults; see 'lsa-train config')"},
        {"data", "SHARDS", LSA_OPT_STR, &data, "shard folder"},
        {"out", "RUN", LSA_OPT_STR, &out, "run folder to make"},
        {"init", "CKPT", LSA_OPT_STR, &init, "start from this checkpoint, widened to the recipe's geometry"},
        {"set", "KEY=VALUE", LSA_OPT_MULTI, &set, "override a recipe key; may be repeated"},
        {"device", "DEVICE", LSA_OPT_STR, &device, DEVICE_HELP},
        RANKS_OPTS(w),
        {0}};
    lsa_recipe r;
    lsa_cli_parse("Fit the memory indexer to the shards.", "", opts, argc, argv, NULL, 0);
    if (!data || !out) LSA_RET_FAIL(LSA_E_ARG, "--data and --out are required; see --help");
    lsa_status st = lsa_recipe_load(&r, lsa_recipe_keys, lsa_recipe_n_key, recipe, set.v, set.n, err);
    if (st == LSA_OK) st = ranks_open(&w, err);
    if (st == LSA_OK) st = lsa_train_run(&r, data, out, init, device, w.comm, err);
    return ranks_close(&w, st, err);
}

static lsa_status cmd_resume(int argc, char **argv, lsa_err *err) {
    const char *dir, *device = "auto";
    ranks w = RANKS_DEFAULT;
    const lsa_opt opts[] = {{"device", "DEVICE", LSA_OPT_STR, &device, DEVICE_HELP}, RANKS_OPTS(w), {0}};
    lsa_cli_parse("Go on with an interrupted run, bit for bit, on any number of ranks.", "RUN", opts, argc,
                  argv, &dir, 1);
    lsa_status st = ranks_open(&w, err);
    if (st == LSA_OK) st = lsa_train_resume(dir, device, w.comm, err);
    return ranks_close(&w, st, err);
}

static lsa_status cmd_eval(int argc, char **argv, lsa_err *err) {
    const char *ckpt, *data = NULL, *device = "auto";
    bool json = false, held_out = false, lead;
    ranks w = RANKS_DEFAULT;
    lsa_multi set = {0};
    const lsa_opt opts[] = {
        {"data", "SHARDS", LSA_OPT_STR, &data, "shard folder"},
        {"held-out", NULL, LSA_OPT_FLAG, &held_out, "only the last documents, which the recipe held out"},
        {"set", "KEY=VALUE", LSA_OPT_MULTI, &set,
         "override a key of the checkpoint's recipe, such as eval.budget; may be repeated"},
        {"json", NULL, LSA_OPT_FLAG, &json, "machine-readable"},
        {"device", "DEVICE", LSA_OPT_STR, &device, DEVICE_HELP},
        RANKS_OPTS(w),
        {0}};
    lsa_eval e;
    lsa_recipe r;
    lsa_cli_parse("Evaluate a checkpoint over all candidates of every document.", "CKPT", opts, argc, argv,
                  &ckpt, 1);
    if (!data) LSA_RET_FAIL(LSA_E_ARG, "--data is required; see --help");
    lsa_status st = ranks_open(&w, err);
    lead = st == LSA_OK && lsa_comm_rank(w.comm) == 0;
    if (st == LSA_OK) st = lsa_train_eval(&e, &r, ckpt, data, held_out, device, set.v, set.n, w.comm, err);
    st = ranks_close(&w, st, err);
    if (st != LSA_OK || !lead) return st;
    if (json) {
        json_t *o = lsa_eval_json(&e, &r);
        char *text = json_dumps(o, JSON_REAL_PRECISION(9));
        puts(text ? text : "null");
        free(text);
        json_decref(o);
    } else {
        lsa_eval_print(&e, &r);
    }
    return LSA_OK;
}

/* The recipe's step on a machine that is not at hand; shape and windows come from the shards if there are
 * any.
 */
static lsa_status estimate(const lsa_recipe *r, const char *machine, const char *data, bool json,
                           lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_machine m;
    lsa_estimate e;
    lsa_survey s;
    LSA_TRY(lsa_machine_parse(&m, machine, err));
    if (data) {
        LSA_TRY(lsa_train_survey(&s, r, data, err));
        m.layers = (double)s.n_layer, m.hidden = (double)s.hidden, m.windows = (double)s.windows,
        m.chunks = (double)s.chunks;
    }
    LSA_TRY(lsa_estimate_make(&e, r, &m, err));
    if (json) LSA_TRY(lsa_estimate_print_json(&e, &m, err));
    if (!json) lsa_estimate_print(&e, r, &m);
done:
    return st;
}

static lsa_status cmd_config(int argc, char **argv, lsa_err *err) {
    const char *recipe = NULL, *machine = NULL, *data = NULL;
    bool json = false;
    lsa_multi set = {0};
    const lsa_opt opts[] = {
        {"recipe", "FILE", LSA_OPT_STR, &recipe, "YAML recipe to resolve"},
        {"set", "KEY=VALUE", LSA_OPT_MULTI, &set, "override a recipe key; may be repeated"},
        {"estimate", "MACHINE", LSA_OPT_STR, &machine,
         "instead: time of a step, share of communication and hours on MACHINE, such as gpus=8,nodes=1; more keys: nvlink, net, copy "
         "(GB/s), bf16 (TFLOP/s), and without --data: hidden, layers, chunks, windows (of one pass)"},
        {"data", "SHARDS", LSA_OPT_STR, &data, "shard folder that --estimate is for"},
        {"json", NULL, LSA_OPT_FLAG, &json, "machine-readable estimate"},
        {0}};
    lsa_recipe r;
    char *text = NULL;
    lsa_cli_parse("Print every recipe key with its value, range, default and meaning, as YAML.", "", opts,
                  argc, argv, NULL, 0);
    if (!machine && (data || json))
        LSA_RET_FAIL(LSA_E_ARG, "--data and --json go with --estimate; see --help");
    lsa_status st = lsa_recipe_load(&r, lsa_recipe_keys, lsa_recipe_n_key, recipe, set.v, set.n, err);
    if (st == LSA_OK) st = lsa_recipe_check(&r, err);
    if (st == LSA_OK && machine) return estimate(&r, machine, data, json, err);
    if (st == LSA_OK) st = lsa_recipe_text(&text, &r, lsa_recipe_keys, lsa_recipe_n_key, true, err);
    if (st == LSA_OK) fputs(text, stdout);
    lsa_free(text);
    return st;
}

static void all_candidates(lsa_bench *b) {
    b->r.candidates = LSA_CAND_ALL;
    b->r.loss = LSA_LOSS_KL;
    b->r.ensemble = LSA_ON_SUM;
}

static lsa_status bench_cases(lsa_bench *b, const char *which, const char *data, const char *device,
                              lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t batch[] = {256, 1024, 64};
    if (lsa_comm_size(b->comm) > 1 && (!which || !strcmp(which, "eval") || !strcmp(which, "stream")))
        LSA_RET_FAIL(LSA_E_ARG, "several ranks measure training: --case train or full");
    if (which && !strcmp(which, "stream")) return lsa_bench_stream(b, data, device, err);
    if (which && !strcmp(which, "eval")) return lsa_bench_eval(b, device, err);
    if (which) return lsa_bench_train(b, device, err);
    for (int i = 0; i < 3; i++) {
        b->r.batch = batch[i];
        LSA_TRY(lsa_bench_train(b, device, err));
    }
    b->r.batch = 256;
    LSA_TRY(lsa_bench_eval(b, device, err));
    all_candidates(b);
    LSA_TRY(lsa_bench_train(b, device, err));
done:
    return st;
}

/* One case with the shape's options; or, without --case, the published recipe at three batch sizes, all
 * candidates, and evaluation. */
static lsa_status cmd_bench(int argc, char **argv, lsa_err *err) {
    lsa_status st = LSA_OK;
    const char *device = "cuda", *which = NULL, *data = NULL;
    int64_t layers = 8, heads = 128, rank = 2048, hidden = 4096, candidates = 2048, chunks = 32768,
            steps = 20;
    bool no_verify = false, no_overlap = false;
    ranks w = RANKS_DEFAULT;
    lsa_multi set = {0};
    lsa_bench b;
    const lsa_opt opts[] = {
        {"case", "NAME", LSA_OPT_STR, &which,
         "only this: train, full (all candidates, KL), eval, or stream (documents of --data)"},
        {"data", "SHARDS", LSA_OPT_STR, &data, "shard folder of --case stream"},
        {"layers", "N", LSA_OPT_I64, &layers, "joint layers (default 8)"},
        {"heads", "N", LSA_OPT_I64, &heads, "heads (default 128)"},
        {"rank", "N", LSA_OPT_I64, &rank, "rank (default 2048)"},
        {"hidden", "N", LSA_OPT_I64, &hidden, "width of the hidden vectors (default 4096)"},
        {"candidates", "N", LSA_OPT_I64, &candidates, "candidates of a window (default 2048)"},
        {"chunks", "N", LSA_OPT_I64, &chunks, "chunks of a document (default 32768)"},
        {"steps", "N", LSA_OPT_I64, &steps, "steps timed in each of 5 repeats (default 20; 0: verify only)"},
        {"no-verify", NULL, LSA_OPT_FLAG, &no_verify, "skip the comparison of the gradient with ref"},
        {"set", "KEY=VALUE", LSA_OPT_MULTI, &set,
         "recipe key, such as train.batch or loss.kind; may be repeated"},
        {"device", "DEVICE", LSA_OPT_STR, &device, "cuda or cuda:N (default cuda)"},
        {"no-overlap", NULL, LSA_OPT_FLAG, &no_overlap,
         "several GPUs: exchange gradients after the backward pass, not beside it"},
        RANKS_OPTS(w),
        {0}};
    lsa_cli_parse("Measure the GPU step on random documents: one JSON line a case.", "", opts, argc, argv,
                  NULL, 0);
    if (which && strcmp(which, "train") && strcmp(which, "full") && strcmp(which, "eval") &&
        strcmp(which, "stream"))
        LSA_RET_FAIL(LSA_E_ARG, "--case '%s': expected train, full, eval or stream", which);
    if (which && !strcmp(which, "stream") && !data)
        LSA_RET_FAIL(LSA_E_ARG, "--case stream needs --data; see --help");
    LSA_TRY(lsa_bench_default(&b, err));
    b.layers = layers, b.heads = heads, b.rank = rank, b.hidden = hidden, b.candidates = candidates,
    b.chunks = chunks, b.steps = steps;
    b.verify = !no_verify;
    b.no_overlap = no_overlap;
    if (which && !strcmp(which, "full")) all_candidates(&b);
    LSA_TRY(lsa_recipe_set(&b.r, lsa_recipe_keys, lsa_recipe_n_key, set.v, set.n, err));
    LSA_TRY(ranks_open(&w, err));
    b.comm = w.comm;
    LSA_TRY(bench_cases(&b, which, data, device, err));
done:
    return ranks_close(&w, st, err);
}

int main(int argc, char **argv) {
    static const lsa_subcommand subs[] = {
        {"run", "train in a fresh run folder", cmd_run},
        {"resume", "go on with an interrupted run", cmd_resume},
        {"eval", "evaluate a checkpoint", cmd_eval},
        {"bench", "measure the GPU step", cmd_bench},
        {"config", "print or check a recipe, or estimate its cost", cmd_config},
        {0}};
    lsa_h5_init();
    return lsa_cli_main("lsa-train", "train the memory indexer of Lookahead Sparse Attention", subs, argc,
                        argv);
}
