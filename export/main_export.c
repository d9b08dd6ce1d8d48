/* lsa-export: checkpoints <-> files that servers load. */
#include <math.h>
#include <stdbool.h>
#include <stdio.h>

#include "data/weights.h"
#include "export/card.h"
#include "export/conform.h"
#include "export/import.h"
#include "export/write.h"
#include "kernels/core/cli.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"

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
        {"card", "print the model card", cmd_card},
        {"import", "existing weights -> checkpoint", cmd_import},
        {0}};
    return lsa_cli_main("lsa-export", "ship memory indexers to serving", subs, argc, argv);
}
