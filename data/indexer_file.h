/* The exported indexer folder INDEXER/: what servers and lsa-decode load. Format: export/EXPORT_FORMAT.md.
 *
 * indexer.safetensors holds exactly
 * retrievers.l{ord}.{wq_a.weight,wq_b.weight,q_norm_weight,weights_proj.weight} in fp32 and string metadata:
 * format=pt, lsa.format=lsa-indexer/1, lsa.geometry (JSON), lsa.select (JSON: ensemble sum|mean|max, tau,
 * tail, threshold), lsa.train (JSON: step, recipe hash, data hash, teacher name+hash, max trained position),
 * and lsa.calibration (JSON) once calibrated.
 */
#ifndef LSA_DATA_INDEXER_FILE_H
#define LSA_DATA_INDEXER_FILE_H

#include "kernels/core/json.h"
#include "kernels/core/lsa_status.h"
#include "kernels/model/indexer.h"

/* How the layers' logits become one score per chunk. SUM of logits is the default; MAX of sigmoids is the
 * reference's. */
typedef enum lsa_ensemble { LSA_ENSEMBLE_SUM = 0, LSA_ENSEMBLE_MEAN, LSA_ENSEMBLE_MAX } lsa_ensemble;
const char *lsa_ensemble_name(lsa_ensemble e); /* "sum", "mean", "max" */
LSA_NODISCARD lsa_status lsa_ensemble_parse(lsa_ensemble *out, const char *s, lsa_err *err);

typedef struct lsa_indexer_file {
    lsa_indexer_geom geom;
    float *params; /* host, flat order of the parameter table; owned */
    lsa_ensemble ensemble;
    int64_t tau, tail;   /* tokens, as trained */
    double threshold;    /* on the mean or max of sigmoids; 0.5 uncalibrated */
    json_t *train;       /* provenance, owned; may be NULL on write */
    json_t *calibration; /* what lsa-export calibrate measured (export/EXPORT_FORMAT.md), owned; NULL: none */
} lsa_indexer_file;

LSA_NODISCARD lsa_status lsa_indexer_file_load(lsa_indexer_file *out, const char *dir, lsa_err *err);
LSA_NODISCARD lsa_status lsa_indexer_file_save(const lsa_indexer_file *f, const char *dir, lsa_err *err);
void lsa_indexer_file_fini(lsa_indexer_file *f);

#endif
