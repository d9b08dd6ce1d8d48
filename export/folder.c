/* Exported folders: see folder.h. The final name exists only once everything in it was read back. */
#include "export/folder.h"

#include <string.h>

#include "export/card.h"
#include "export/golden.h"
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

static lsa_status write_files(const lsa_indexer_file *f, const char *dir, lsa_err *err) {
    lsa_status st = LSA_OK;
    char path[LSA_PATH_MAX], *card = NULL, *plot = NULL;
    LSA_TRY(lsa_indexer_file_save(f, dir, err));
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
    char target[LSA_PATH_MAX], tmp[LSA_PATH_MAX];
    double worst;
    LSA_TRY(lsa_path(target, err, "%s", out));
    for (size_t n = strlen(target); n > 1 && target[n - 1] == '/'; n--) target[n - 1] = 0;
    LSA_TRY(lsa_export_check_target(target, o->force, err));
    LSA_TRY(lsa_path(tmp, err, "%s.tmp", target));
    LSA_TRY(lsa_remove_tree(tmp, err));
    LSA_TRY(lsa_mkdirs(tmp, err));
    LSA_TRY(write_files(f, tmp, err));
    LSA_TRY(lsa_export_verify(tmp, ckpt, &worst, err));
    LSA_TRY(lsa_fsync_path(tmp, err));
    if (lsa_exists(target)) LSA_TRY(lsa_remove_tree(target, err));
    LSA_TRY(lsa_rename_durable(tmp, target, err));
done:
    return st;
}
