/* Options of lsa-dump run, as users give them and as the manifest records them. */
#ifndef LSA_DATA_DUMP_OPTIONS_H
#define LSA_DATA_DUMP_OPTIONS_H

#include "data/dump/tap.h"
#include "kernels/core/json.h"

typedef struct lsa_dump_opts {
    const char *teacher, *tokens, *needs, *documents; /* needs and documents may be NULL */
    const char *layers;                               /* "all" or ordinals "0,2" */
    double top_p, dense_min;
    int64_t pool; /* 0: the teacher's index_topk */
    int64_t hidden_stride, dense_every, shard_bytes;
    bool no_stats, sim_fp8, sim_fp4;
    bool stream;         /* weights layer by layer through the GPU. Not recorded, as the next two */
    int64_t wave_tokens; /* with stream: tokens that pass a layer together; 0: what the host budget holds */
    const char *streams; /* with stream: what is kept between two layers, "f32" or "bf16". Recorded */
    const char *streams_dir; /* and where: a folder, or NULL: pinned memory. Not recorded */
    int64_t host_budget; /* bytes of host memory; 0: this machine's. Not recorded: it changes nothing that is
                            written */
} lsa_dump_opts;
lsa_dump_opts lsa_dump_defaults(void);
bool lsa_dump_half_streams(const lsa_dump_opts *o);

/* The manifest's `run` object; path: absolute teacher, tokens and needs (or NULL). NULL if a path is not
 * UTF-8. */
json_t *lsa_dump_opts_to_json(const lsa_dump_opts *o, const char *const path[3], uint64_t docs_hash,
                              int64_t n_doc);
/* Borrows strings of `j`. LSA_E_FORMAT if these shards were not made by `lsa-dump run`. */
LSA_NODISCARD lsa_status lsa_dump_opts_from_json(lsa_dump_opts *o, const json_t *j, const char *where,
                                                 lsa_err *err);

/* What the options mean for this teacher; LSA_E_ARG names the option that is out of range, LSA_E_UNSUPPORTED
 * a teacher that cannot be dumped. */
LSA_NODISCARD lsa_status lsa_dump_make_rule(lsa_dump_rule *r, const lsa_dump_opts *o,
                                            const lsa_teacher_config *c, lsa_err *err);

#endif
