/* Exported folders: see folder.h. The final name exists only once everything in it was read back. */
#include "export/folder.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "data/torch_file.h"
#include "export/card.h"
#include "export/golden.h"
#include "export/variants.h"
#include "export/write.h"
#include "kernels/core/file.h"
#include "kernels/core/mem.h"

lsa_status lsa_export_check_target(const char *out, bool force, lsa_err *err) {
    char path[LSA_PATH_MAX];
    lsa_status st = lsa_path(path, err, "%s/indexer.safetensors", out);
    if (st != LSA_OK || !lsa_exists(out)) return st;
    if (!lsa_exists(path))
        LSA_RET_FAIL(LSA_E_ARG, "'%s' exists and is not an exported indexer; choose another --out", out);
    if (!force) LSA_RET_FAIL(LSA_E_ARG, "'%s' already holds an indexer; give --force to replace it", out);
    return LSA_OK;
}

lsa_status lsa_has_layer_files(bool *out, const char *dir, lsa_err *err) {
    DIR *d = opendir(dir);
    *out = false;
    if (!d) LSA_RET_FAIL(LSA_E_IO, "cannot open '%s': %s", dir, strerror(errno));
    for (struct dirent *e; (e = readdir(d));) *out = *out || lsa_layer_file_id(e->d_name) >= 0;
    closedir(d);
    return LSA_OK;
}

int32_t lsa_layer_file_id(const char *name) {
    int id = -1, end = 0;
    if (sscanf(name, "layer_%3d.safetensors%n", &id, &end) != 1 || end == 0 || name[end]) return -1;
    return id >= 0 && id < LSA_MAX_LAYERS ? id : -1;
}

lsa_status lsa_export_options_of(lsa_export_options *out, const char *dir, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_torch *t = NULL;
    char path[LSA_PATH_MAX];
    *out = (lsa_export_options){0};
    LSA_TRY(lsa_path(path, err, "%s/indexer.gguf", dir));
    out->gguf = lsa_exists(path);
    LSA_TRY(lsa_has_layer_files(&out->per_layer, dir, err));
    LSA_TRY(lsa_path(path, err, "%s/indexer.pt", dir));
    out->pt = lsa_exists(path);
    if (!out->pt) goto done;
    LSA_TRY(lsa_torch_open(&t, path, err));
    for (int64_t i = 0; i < lsa_torch_count(t); i++) {
        const lsa_st_tensor *x = lsa_torch_at(t, i);
        if (x->dtype == LSA_C64 && x->n_dim == 2) out->pt_freqs = x->shape[0];
    }
done:
    lsa_torch_close(t);
    return st;
}

static lsa_status write_files(const lsa_indexer_file *f, const char *dir, const lsa_export_options *o,
                              lsa_err *err) {
    lsa_status st = LSA_OK;
    char path[LSA_PATH_MAX], *card = NULL, *plot = NULL;
    LSA_TRY(lsa_indexer_file_save(f, dir, err));
    LSA_TRY(lsa_variants_write(f, dir, o, err));
    LSA_TRY(lsa_golden_vectors_write(f, dir, err));
    LSA_TRY(lsa_card_text(&card, f, err));
    LSA_TRY(lsa_path(path, err, "%s/README.md", dir));
    LSA_TRY(lsa_write_file(path, card, strlen(card), err));
    LSA_TRY(lsa_card_plot(&plot, f, err));
    if (plot) {
        LSA_TRY(lsa_path(path, err, "%s/calibration.svg", dir));
        LSA_TRY(lsa_write_file(path, plot, strlen(plot), err));
    }
done:
    lsa_free(card);
    lsa_free(plot);
    return st;
}

lsa_status lsa_export_folder(const lsa_indexer_file *f, const char *out, const lsa_export_options *o,
                             const char *ckpt, lsa_err *err) {
    lsa_status st = LSA_OK;
    char target[LSA_PATH_MAX], tmp[LSA_PATH_MAX] = "";
    double worst;
    LSA_TRY(lsa_path(target, err, "%s", out));
    for (size_t n = strlen(target); n > 1 && target[n - 1] == '/'; n--) target[n - 1] = 0;
    LSA_TRY(lsa_export_check_target(target, o->force, err));
    LSA_TRY(lsa_path(tmp, err, "%s.tmp", target));
    LSA_TRY(lsa_remove_tree(tmp, err));
    LSA_TRY(lsa_mkdirs(tmp, err));
    LSA_TRY(write_files(f, tmp, o, err));
    LSA_TRY(lsa_export_verify(tmp, ckpt, &worst, err));
    LSA_TRY(lsa_fsync_path(tmp, err));
    LSA_TRY(lsa_replace_dir(tmp, target, err));
done:
    if (st != LSA_OK && tmp[0]) (void)!lsa_remove_tree(tmp, NULL); /* the first failure is the one to tell */
    return st;
}
