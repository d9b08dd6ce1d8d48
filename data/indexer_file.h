/* The exported indexer folder INDEXER/: what servers and lsa-decode load. Format: export/EXPORT_FORMAT.md.
 *
 * indexer.safetensors holds exactly
 * retrievers.l{ord}.{wq_a.weight,wq_b.weight,q_norm_weight,weights_proj.weight} in fp32, bf16 or fp8 with
 * scales (data/weights.h) and string metadata: format=pt, lsa.format=lsa-indexer/1, lsa.dtype, lsa.geometry
 * (JSON), lsa.select (JSON: ensemble sum|mean|max, tau, tail, threshold), lsa.train (JSON: step, recipe hash,
 * data hash, teacher name+hash, max trained position), lsa.calibration (JSON) once calibrated, and
 * lsa.continuation (JSON: the costs b) if the sum has a continuation (kernels/continuation.h) and lsa.prior
 * (JSON: weights, decay, unit) if observed mass is added to it (kernels/prior.h).
 */
#ifndef LSA_DATA_INDEXER_FILE_H
#define LSA_DATA_INDEXER_FILE_H

#include <stdbool.h>

#include "data/sink.h"
#include "data/tensor_file.h"
#include "kernels/core/dtype.h"
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
    float *params;   /* host, flat order of the parameter table; owned; exact in dtype (lsa_weights_round) */
    lsa_dtype dtype; /* of the matrices in files: F32, BF16, F8_E4M3 */
    lsa_ensemble ensemble;
    int64_t tau, tail;   /* tokens, as trained */
    double threshold;    /* on the mean or max of sigmoids; 0.5 uncalibrated */
    json_t *train;       /* provenance, owned; may be NULL on write */
    json_t *calibration; /* what lsa-export calibrate measured (export/EXPORT_FORMAT.md), owned; NULL: none */
} lsa_indexer_file;

LSA_NODISCARD lsa_status lsa_indexer_file_load(lsa_indexer_file *out, const char *dir, lsa_err *err);
LSA_NODISCARD lsa_status lsa_indexer_file_save(const lsa_indexer_file *f, const char *dir, lsa_err *err);
void lsa_indexer_file_fini(lsa_indexer_file *f);

/* The bytes of indexer.safetensors; without the joint prefix (`joint` false) f must have one layer. */
LSA_NODISCARD lsa_status lsa_indexer_file_emit(lsa_sink *to, const lsa_indexer_file *f, bool joint,
                                               lsa_err *err);

/* {"b": [b_1 .. b_reach]}, a new reference; NULL: no continuation. */
json_t *lsa_indexer_costs_json(const lsa_indexer_file *f);
/* {"weights": [w_1, w_2], "decay", "unit"}, a new reference; NULL: no prior. */
json_t *lsa_indexer_prior_json(const lsa_indexer_file *f);

/* The string metadata: pair = {key, value, ..., NULL} as lsa_st_save takes it. */
typedef struct lsa_indexer_meta {
    const char *pair[20];
    char *text[6]; /* owned */
} lsa_indexer_meta;
LSA_NODISCARD lsa_status lsa_indexer_meta_make(lsa_indexer_meta *m, const lsa_indexer_file *f, lsa_err *err);
void lsa_indexer_meta_fini(lsa_indexer_meta *m);
/* Everything of *f but params from the metadata of `from`, which must have lsa.format. */
LSA_NODISCARD lsa_status lsa_indexer_meta_read(lsa_indexer_file *f, const lsa_tensor_file *from,
                                               lsa_err *err);
/* Memory for f->params, the layers' still zero; the costs of the continuation and the weights of
 * the prior from the metadata of `from`. */
LSA_NODISCARD lsa_status lsa_indexer_params_new(lsa_indexer_file *f, const lsa_tensor_file *from,
                                                lsa_err *err);

#endif
