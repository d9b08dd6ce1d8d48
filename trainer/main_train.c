/* lsa-train: shards -> checkpoint. */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

#include "data/h5.h"
#include "kernels/core/cli.h"
#include "kernels/core/mem.h"
#include "trainer/run.h"

static const char *const DEVICE_HELP = "where to train: auto, cpu, cuda, cuda:N or ref (default auto)";

static lsa_status cmd_run(int argc, char **argv, lsa_err *err) {
    const char *recipe = NULL, *data = NULL, *out = NULL, *init = NULL, *device = "auto";
    lsa_multi set = {0};
    const lsa_opt opts[] = {
        {"recipe", "FILE", LSA_OPT_STR, &recipe,
         "YAML recipe (default: all defaults; see 'lsa-train config')"},
        {"data", "SHARDS", LSA_OPT_STR, &data, "shard folder"},
        {"out", "RUN", LSA_OPT_STR, &out, "run folder to make"},
        {"init", "CKPT", LSA_OPT_STR, &init, "start from this checkpoint, widened to the recipe's geometry"},
        {"set", "KEY=VALUE", LSA_OPT_MULTI, &set, "override a recipe key; may be repeated"},
        {"device", "DEVICE", LSA_OPT_STR, &device, DEVICE_HELP},
        {0}};
    lsa_recipe r;
    lsa_cli_parse("Fit the memory indexer to the shards.", "", opts, argc, argv, NULL, 0);
    if (!data || !out) LSA_RET_FAIL(LSA_E_ARG, "--data and --out are required; see --help");
    lsa_status st = lsa_recipe_load(&r, lsa_recipe_keys, lsa_recipe_n_key, recipe, set.v, set.n, err);
    return st == LSA_OK ? lsa_train_run(&r, data, out, init, device, err) : st;
}

static lsa_status cmd_resume(int argc, char **argv, lsa_err *err) {
    const char *dir, *device = "auto";
    const lsa_opt opts[] = {{"device", "DEVICE", LSA_OPT_STR, &device, DEVICE_HELP}, {0}};
    lsa_cli_parse("Go on with an interrupted run, bit for bit.", "RUN", opts, argc, argv, &dir, 1);
    return lsa_train_resume(dir, device, err);
}

static lsa_status cmd_eval(int argc, char **argv, lsa_err *err) {
    const char *ckpt, *data = NULL, *device = "auto";
    bool json = false, held_out = false;
    lsa_multi set = {0};
    const lsa_opt opts[] = {
        {"data", "SHARDS", LSA_OPT_STR, &data, "shard folder"},
        {"held-out", NULL, LSA_OPT_FLAG, &held_out, "only the last documents, which the recipe held out"},
        {"set", "KEY=VALUE", LSA_OPT_MULTI, &set,
         "override a key of the checkpoint's recipe, such as eval.budget; may be repeated"},
        {"json", NULL, LSA_OPT_FLAG, &json, "machine-readable"},
        {"device", "DEVICE", LSA_OPT_STR, &device, DEVICE_HELP},
        {0}};
    lsa_eval e;
    lsa_recipe r;
    lsa_cli_parse("Evaluate a checkpoint over all candidates of every document.", "CKPT", opts, argc, argv,
                  &ckpt, 1);
    if (!data) LSA_RET_FAIL(LSA_E_ARG, "--data is required; see --help");
    lsa_status st = lsa_train_eval(&e, &r, ckpt, data, held_out, device, set.v, set.n, err);
    if (st != LSA_OK) return st;
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

static lsa_status cmd_config(int argc, char **argv, lsa_err *err) {
    const char *recipe = NULL;
    lsa_multi set = {0};
    const lsa_opt opts[] = {
        {"recipe", "FILE", LSA_OPT_STR, &recipe, "YAML recipe to resolve"},
        {"set", "KEY=VALUE", LSA_OPT_MULTI, &set, "override a recipe key; may be repeated"},
        {0}};
    lsa_recipe r;
    char *text = NULL;
    lsa_cli_parse("Print every recipe key with its value, range, default and meaning, as YAML.", "", opts,
                  argc, argv, NULL, 0);
    lsa_status st = lsa_recipe_load(&r, lsa_recipe_keys, lsa_recipe_n_key, recipe, set.v, set.n, err);
    if (st == LSA_OK) st = lsa_recipe_check(&r, err);
    if (st == LSA_OK) st = lsa_recipe_text(&text, &r, lsa_recipe_keys, lsa_recipe_n_key, true, err);
    if (st == LSA_OK) fputs(text, stdout);
    lsa_free(text);
    return st;
}

int main(int argc, char **argv) {
    static const lsa_subcommand subs[] = {{"run", "train in a fresh run folder", cmd_run},
                                          {"resume", "go on with an interrupted run", cmd_resume},
                                          {"eval", "evaluate a checkpoint", cmd_eval},
                                          {"config", "print or check a recipe", cmd_config},
                                          {0}};
    lsa_h5_init();
    return lsa_cli_main("lsa-train", "train the memory indexer of Lookahead Sparse Attention", subs, argc,
                        argv);
}
