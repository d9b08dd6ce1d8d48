/* lsa-export: checkpoints <-> files that servers load. */
#include <stdbool.h>
#include <stdio.h>

#include "export/card.h"
#include "export/conform.h"
#include "export/write.h"
#include "kernels/core/cli.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"

static lsa_status cmd_write(int argc, char **argv, lsa_err *err) {
    const char *ckpt, *out = NULL, *ensemble = "sum";
    double threshold = 0.5;
    lsa_export_options o = {0};
    const lsa_opt opts[] = {
        {"out", "INDEXER", LSA_OPT_STR, &out, "folder to write"},
        {"ensemble", "RULE", LSA_OPT_STR, &ensemble,
         "how servers combine the layers: sum of logits, mean or max of sigmoids (default sum)"},
        {"threshold", "X", LSA_OPT_F64, &threshold,
         "recorded threshold on the sigmoid (default 0.5, uncalibrated)"},
        {"force", NULL, LSA_OPT_FLAG, &o.force, "replace an existing indexer"},
        {0}};
    lsa_ensemble e;
    lsa_cli_parse(
        "Write indexer.safetensors, golden.safetensors and a model card from a checkpoint (a step, latest, best, or a run: its best).",
        "CKPT", opts, argc, argv, &ckpt, 1);
    if (!out) LSA_RET_FAIL(LSA_E_ARG, "--out is required; see --help");
    lsa_status st = lsa_ensemble_parse(&e, ensemble, err);
    if (st == LSA_OK && !(threshold >= 0 && threshold <= 1))
        LSA_RET_FAIL(LSA_E_ARG, "--threshold must be in [0, 1], found %g", threshold);
    if (st == LSA_OK) st = lsa_export_write(ckpt, out, e, threshold, &o, err);
    if (st == LSA_OK) lsa_info("wrote %s/indexer.safetensors, golden.safetensors and README.md", out);
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
    const char *teacher, *out = NULL, *layers = "all";
    const lsa_opt opts[] = {
        {"out", "CKPT", LSA_OPT_STR, &out, "run folder that gets the checkpoint (for lsa-train run --init)"},
        {"layers", "LIST", LSA_OPT_STR, &layers, "CSA ordinals: all, or 0,2 (default all)"},
        {0}};
    lsa_cli_parse("Make a checkpoint of a teacher's native indexer weights.", "TEACHER", opts, argc, argv,
                  &teacher, 1);
    if (!out) LSA_RET_FAIL(LSA_E_ARG, "--out is required; see --help");
    lsa_status st = lsa_export_import(teacher, out, layers, err);
    if (st == LSA_OK) lsa_info("wrote %s/ckpt/step_00000000", out);
    return st;
}

int main(int argc, char **argv) {
    static const lsa_subcommand subs[] = {
        {"write", "checkpoint -> indexer folder", cmd_write},
        {"verify", "prove an indexer folder, or another engine, by the golden vectors", cmd_verify},
        {"card", "print the model card", cmd_card},
        {"import", "a teacher's native indexer -> checkpoint", cmd_import},
        {0}};
    return lsa_cli_main("lsa-export", "ship memory indexers to serving", subs, argc, argv);
}
