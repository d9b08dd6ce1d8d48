/* lsa-export: checkpoints <-> files that servers load. */
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

#include "data/h5.h"
#include "data/weights.h"
#include "export/card.h"
#include "export/conform.h"
#include "export/import.h"
#include "export/write.h"
#include "kernels/core/cli.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"
#include "trainer/calibrate.h"

static lsa_status cmd_write(int argc, char **argv, lsa_err *err) {
    const char *ckpt, *out = NULL, *ensemble = NULL, *dtype = NULL;
    double threshold = -HUGE_VAL; /* not given */
    lsa_export_options o = {.pt_freqs = -1};
    const lsa_opt opts[] = {
        {"out", "INDEXER", LSA_OPT_STR, &out, "folder to write"},
        {"ensemble", "RULE", LSA_OPT_STR, &ensemble,
         "how servers combine the layers: sum of logits, mean or max of sigmoids (default sum)"},
        {"threshold", "X", LSA_OPT_F64, &threshold,
         "recorded threshold on the sigmoid (default 0.5, uncalibrated)"},
        {"dtype", "TYPE", LSA_OPT_STR, &dtype,
         "weights as f32, bf16, or fp8 (e4m3 with one f32 scale a row); q_norm stays f32 (default f32)"},
        {"pt", NULL, LSA_OPT_FLAG, &o.pt, "also indexer.pt, which torch.load(weights_only=True) reads"},
        {"pt-freqs", "N", LSA_OPT_I64, &o.pt_freqs,
         "indexer.pt with freqs_cis tables of N positions (8 bytes x N x 32)"},
        {"per-layer", NULL, LSA_OPT_FLAG, &o.per_layer,
         "also layer_{id}.safetensors, one a layer, names without prefix"},
        {"gguf", NULL, LSA_OPT_FLAG, &o.gguf, "also indexer.gguf with blk.{id}.memidx.* and memidx.* keys"},
        {"licence", "TEXT", LSA_OPT_STR, &o.licence, "licence named in the model card (default: not stated)"},
        {"force", NULL, LSA_OPT_FLAG, &o.force, "replace an existing indexer"},
        {0}};
    lsa_ensemble e;
    lsa_dtype t;
    lsa_cli_parse(
        "Write indexer.safetensors, golden.safetensors and a model card from a checkpoint (a step, latest, best, or a run: its best). "
        "Of an imported export, what is not given here stays as it was.",
        "CKPT", opts, argc, argv, &ckpt, 1);
    if (!out) LSA_RET_FAIL(LSA_E_ARG, "--out is required; see --help");
    if (o.pt_freqs == 0 || o.pt_freqs < -1 || o.pt_freqs > LSA_PT_FREQS_MAX)
        LSA_RET_FAIL(LSA_E_ARG, "--pt-freqs must be in [1, %lld], found %lld", (long long)LSA_PT_FREQS_MAX,
                     (long long)o.pt_freqs);
    o.pt = o.pt || o.pt_freqs > 0;
    o.pt_freqs = o.pt_freqs > 0 ? o.pt_freqs : 0;
    const bool given = threshold != -HUGE_VAL;
    if (given && !(threshold >= 0 && threshold <= 1))
        LSA_RET_FAIL(LSA_E_ARG, "--threshold must be in [0, 1], found %g", threshold);
    lsa_status st = ensemble ? lsa_ensemble_parse(&e, ensemble, err) : LSA_OK;
    if (st == LSA_OK && dtype) st = lsa_weight_dtype_parse(&t, dtype, err);
    const lsa_export_rule rule = {ensemble ? &e : NULL, given ? &threshold : NULL, dtype ? &t : NULL};
    if (st == LSA_OK) st = lsa_export_write(ckpt, out, &rule, &o, err);
    if (st == LSA_OK)
        lsa_info("wrote %s: indexer.safetensors, golden.safetensors, README.md%s%s%s", out,
                 o.pt ? ", indexer.pt" : "", o.per_layer ? ", layer_*.safetensors" : "",
                 o.gguf ? ", indexer.gguf" : "");
    return st;
}

/* Another engine's vectors against the golden ones. */
static lsa_status verify_engine(const char *dir, const char *file, double *worst, int64_t *n, lsa_err *err) {
    lsa_indexer_file f = {0};
    lsa_status st = lsa_indexer_file_load(&f, dir, err);
    if (st == LSA_OK) st = lsa_conform_file(&f, dir, file, worst, n, err);
    lsa_indexer_file_fini(&f);
    return st;
}

static lsa_status cmd_verify(int argc, char **argv, lsa_err *err) {
    const char *dir, *ckpt = NULL, *against = NULL;
    bool json = false;
    const lsa_opt opts[] = {{"checkpoint", "CKPT", LSA_OPT_STR, &ckpt,
                             "also compare the tensors with this checkpoint, bit by bit"},
                            {"against", "FILE", LSA_OPT_STR, &against,
                             "judge what another engine computed from the golden inputs: a safetensors file "
                             "with any tensors of golden.safetensors"},
                            {"json", NULL, LSA_OPT_FLAG, &json, "machine-readable"},
                            {0}};
    double worst = 0;
    int64_t n = 0;
    lsa_cli_parse(
        "Replay the golden vectors of an exported indexer on our kernels, or judge another engine's; "
        "names the convention at fault.",
        "INDEXER", opts, argc, argv, &dir, 1);
    if (ckpt && against) LSA_RET_FAIL(LSA_E_ARG, "--checkpoint and --against exclude each other");
    lsa_status st =
        against ? verify_engine(dir, against, &worst, &n, err) : lsa_export_verify(dir, ckpt, &worst, err);
    if (st != LSA_OK) return st;
    if (json)
        printf("{\"ok\": true, \"worst_relative\": %.3g, \"checkpoint\": %s, \"tensors\": %lld}\n", worst,
               ckpt ? "true" : "false", (long long)n);
    else if (against)
        printf("ok: %lld tensors of '%s' agree with the golden vectors (f32 path within %.2g)\n",
               (long long)n, against, worst);
    else
        printf("ok: every stage within its limit of the golden vectors (f32 path within %.2g)%s\n", worst,
               ckpt ? ", tensors equal to the checkpoint" : "");
    return LSA_OK;
}

typedef struct calibrate_args {
    const char *dir, *data, *documents, *out, *device, *licence;
    double fold;
    int64_t fold_tokens;
    bool force, check, json;
} calibrate_args;

/* --check: the stored thresholds on other documents. */
static lsa_status load_calibration(lsa_calibration *c, const lsa_indexer_file *f, const char *dir,
                                   lsa_err *err) {
    if (!f->calibration)
        LSA_RET_FAIL(LSA_E_ARG, "'%s' is not calibrated; run 'lsa-export calibrate %s --data SHARDS' first",
                     dir, dir);
    return lsa_calibration_from_json(c, f->calibration, f->geom.ord, f->geom.n_layer, dir, err);
}

static lsa_status calibrate(const calibrate_args *a, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_indexer_file f = {0};
    lsa_measure *m = NULL;
    lsa_calibration *c = NULL;
    lsa_export_options o;
    char *text = NULL;
    if (a->out) LSA_TRY(lsa_export_check_target(a->out, a->force, err));
    LSA_TRY(lsa_indexer_file_load(&f, a->dir, err));
    LSA_TRY(LSA_NEW(c, 1, err));
    if (a->check) LSA_TRY(load_calibration(c, &f, a->dir, err));
    if (!a->check && a->fold == 0 && json_object_get(f.calibration, "fold"))
        lsa_warn(
            "'%s' was folded: its weights stay scaled, but the new calibration drops the logit offset; give --fold to keep one",
            a->dir);
    LSA_TRY(lsa_measure_open(&m, &f, a->data, a->documents, a->device, a->force, err));
    if (a->check)
        LSA_TRY(lsa_calibration_measure(c, m, err));
    else
        LSA_TRY(lsa_calibrate(c, m, &f.geom, err));
    if (a->fold > 0) LSA_TRY(lsa_calibrate_fold(c, m, &f, a->fold, a->fold_tokens / LSA_CHUNK, err));
    json_decref(f.calibration);
    f.calibration = NULL;
    LSA_TRY(lsa_calibration_to_json(&f.calibration, c, err));
    if (!a->check) {
        if (a->licence) json_object_set_new(f.train, "licence", json_string(a->licence));
        LSA_TRY(lsa_export_options_of(&o, a->dir, err)); /* the files beside it follow */
        o.force = true;
        LSA_TRY(lsa_export_folder(&f, a->out ? a->out : a->dir, &o, NULL, err));
    }
    if (a->json) {
        text = json_dumps(f.calibration, JSON_REAL_PRECISION(9));
        if (!text) LSA_FAIL(LSA_E_NOMEM, "cannot format the calibration");
        puts(text);
    } else {
        lsa_calibration_print(c, f.ensemble);
    }
    if (!a->check) lsa_info("wrote %s: calibration, golden vectors and model card", a->out ? a->out : a->dir);
done:
    free(text);
    lsa_free(c);
    lsa_measure_close(m);
    lsa_indexer_file_fini(&f);
    return st;
}

static lsa_status cmd_calibrate(int argc, char **argv, lsa_err *err) {
    calibrate_args a = {.device = "auto"};
    const lsa_opt opts[] = {
        {"data", "SHARDS", LSA_OPT_STR, &a.data, "documents that the indexer was not trained on"},
        {"documents", "A:B", LSA_OPT_STR, &a.documents,
         "half-open range of documents, from 0 (default: all; of the training run's own shards those it held out)"},
        {"out", "DIR", LSA_OPT_STR, &a.out, "write here instead of replacing INDEXER"},
        {"fold", "BUDGET", LSA_OPT_F64, &a.fold,
         "scale the weights so that the reference server's rule, with the logit offset printed, is the calibrated rule for this "
         "budget (0.05, 0.10, 0.135 or 0.20) at one length"},
        {"fold-tokens", "N", LSA_OPT_I64, &a.fold_tokens,
         "that context length in tokens (default: the longest calibrated)"},
        {"check", NULL, LSA_OPT_FLAG, &a.check,
         "measure the stored thresholds on these documents; nothing is written"},
        {"licence", "TEXT", LSA_OPT_STR, &a.licence, "licence named in the model card (default: as it is)"},
        {"device", "DEVICE", LSA_OPT_STR, &a.device,
         "where to score: auto, cpu, cuda or cuda:N (default auto)"},
        {"force", NULL, LSA_OPT_FLAG, &a.force, "allow documents of the training run; replace DIR"},
        {"json", NULL, LSA_OPT_FLAG, &a.json, "machine-readable: the calibration as it is stored"},
        {0}};
    lsa_cli_parse(
        "Fit temperatures, offsets and thresholds for budgets and recalls by context length on held-out documents, and store "
        "them with what they keep in INDEXER.",
        "INDEXER", opts, argc, argv, &a.dir, 1);
    if (!a.data) LSA_RET_FAIL(LSA_E_ARG, "--data is required; see --help");
    if (a.check && (a.fold != 0 || a.out || a.licence))
        LSA_RET_FAIL(LSA_E_ARG, "--check writes nothing: it goes with neither --fold, --out nor --licence");
    if (!(a.fold >= 0)) LSA_RET_FAIL(LSA_E_ARG, "--fold %g is not a budget", a.fold);
    if (a.fold_tokens && (a.fold == 0 || a.fold_tokens < 64))
        LSA_RET_FAIL(LSA_E_ARG, "--fold-tokens goes with --fold and is at least 64");
    return calibrate(&a, err);
}

static lsa_status cmd_card(int argc, char **argv, lsa_err *err) {
    const char *dir;
    const lsa_opt opts[] = {{0}};
    lsa_indexer_file f = {0};
    char *text = NULL;
    lsa_cli_parse("Print the model card of an exported indexer.", "INDEXER", opts, argc, argv, &dir, 1);
    lsa_status st = lsa_indexer_file_load(&f, dir, err);
    if (st == LSA_OK) st = lsa_card_text(&text, &f, err);
    if (st == LSA_OK) fputs(text, stdout);
    lsa_free(text);
    lsa_indexer_file_fini(&f);
    return st;
}

static lsa_status cmd_import(int argc, char **argv, lsa_err *err) {
    const char *source, *out = NULL;
    char note[512];
    lsa_import_options o = {.layers = "all"};
    const lsa_opt opts[] = {
        {"out", "CKPT", LSA_OPT_STR, &out, "run folder that gets the checkpoint (for lsa-train run --init)"},
        {"layers", "LIST", LSA_OPT_STR, &o.layers,
         "CSA ordinals: all, or 0,2 (default all); of a single-layer file, its ordinal"},
        {"teacher", "DIR", LSA_OPT_STR, &o.teacher,
         "model whose config.json gives RoPE constants and layer ids that SOURCE lacks (default DeepSeek-V4-Flash)"},
        {0}};
    lsa_cli_parse(
        "Make a checkpoint of existing weights: a teacher's folder (its native indexer), an exported indexer "
        "or one of its files, a reference .safetensors or .pt with retrievers.l{ordinal}.*, a single-layer file, "
        "or a folder of layer_{id}.safetensors.",
        "SOURCE", opts, argc, argv, &source, 1);
    if (!out) LSA_RET_FAIL(LSA_E_ARG, "--out is required; see --help");
    lsa_status st = lsa_export_import(source, out, &o, note, sizeof note, err);
    if (st == LSA_OK && note[0]) lsa_info("%s", note);
    if (st == LSA_OK) lsa_info("wrote %s/ckpt/step_00000000", out);
    return st;
}

int main(int argc, char **argv) {
    static const lsa_subcommand subs[] = {
        {"write", "checkpoint -> indexer folder", cmd_write},
        {"verify", "prove an indexer folder, or another engine, by the golden vectors", cmd_verify},
        {"calibrate", "thresholds for budgets and recalls, measured on held-out documents", cmd_calibrate},
        {"card", "print the model card", cmd_card},
        {"import", "existing weights -> checkpoint", cmd_import},
        {0}};
    lsa_h5_init();
    return lsa_cli_main("lsa-export", "ship memory indexers to serving", subs, argc, argv);
}
