/* What a step of a recipe costs on a machine that is not at hand: `lsa-train config --estimate`.
 *
 * Arithmetic: the stages of the GPU step as measured on one H100 (kernels/PERF.md, 2026-11-25: 8 layers, 128
 * heads, rank 2048, hidden 4096, 2,048 candidates, at 256 and at 1,024 windows). Each is a straight line in
 * the windows of a GPU: its start is work that all windows share and goes with the parameters, its slope goes
 * with the FLOPs or elements of a window (floors of PERF.md). Another card: both scaled by the two ceilings
 * that `lsa-train bench` prints.
 *
 * Communication: the rate of a node's links and how much is hidden are from two H100s (recipes/SCALING.md);
 * what lies between nodes is not measured. What the step does (kernels/cuda/step/ranks.cu): gradients of wq_b
 * as soon as they are formed, beside the rest of the backward pass; those of the other tensors after it; then
 * the norm, every GPU a slice, and the update; with optim.zero1 of slices, whose bf16 weights are then
 * gathered. By NCCL's rings: a pass over n bytes among W GPUs moves (W-1)/W n bytes through each, at the
 * slower of `nvlink` and, with several nodes, `net`; latencies are those of NCCL's own tuning table
 * (src/graph/tuning.cc at 01afd20, ring, Simple). A sum on every GPU is two passes, a sum in slices or a
 * gathering one. Of the time that an exchange runs beside the backward pass half is gained: each slows the
 * other.
 *
 * Reading documents, evaluations, checkpoints and exchanges of a few bytes are left out. Pure, thread-safe.
 */
#ifndef LSA_TRAINER_ESTIMATE_H
#define LSA_TRAINER_ESTIMATE_H

#include "trainer/recipe_keys.h"

typedef struct lsa_machine {
    double gpus, nodes; /* gpus: of all nodes together, the same number in each */
    double nvlink, net; /* GB/s and direction: a GPU inside a node; a node, all its cards together */
    double copy, bf16;  /* GB/s read plus written, TFLOP/s of one GPU */
    double hidden;      /* width of hidden vectors */
    double chunks;      /* candidates of a window with sample.candidates: all; the most it can sample */
    double windows;     /* of one pass over the data; 0 unknown */
    double layers;      /* joint layers; 0: as many as model.layers names, 21 for all */
} lsa_machine;

/* text: "gpus=8,nodes=1,..." over the defaults, which are an H100 with 8 a node. LSA_E_ARG names the key. */
LSA_NODISCARD lsa_status lsa_machine_parse(lsa_machine *m, const char *text, lsa_err *err);

typedef enum lsa_origin { LSA_FROM_MEASURED = 0, LSA_FROM_SCALED, LSA_FROM_ASSUMED } lsa_origin;

typedef enum lsa_part {
    LSA_PART_SAMPLES = 0,
    LSA_PART_HIDDEN,
    LSA_PART_FORWARD,
    LSA_PART_SCORES,
    LSA_PART_WEIGHTS,
    LSA_PART_NORM,
    LSA_PART_ADAMW,
    LSA_PART_REDUCE, /* of the gradients: what no work hides */
    LSA_PART_GATHER, /* of the weights (optim.zero1) */
    LSA_PARTS
} lsa_part;

typedef struct lsa_estimate {
    int64_t n_layer, n_param, candidates, windows_per_gpu;
    double ms[LSA_PARTS];
    lsa_origin from[LSA_PARTS];
    double reduce_ms;  /* with nothing to hide behind */
    double sent_bytes; /* by each GPU in a step */
    double step_ms, comm_share, windows_per_s;
    double run_hours, pass_hours; /* train.steps; one pass over m->windows (0 unknown) */
} lsa_estimate;

/* LSA_E_CONFIG if the GPUs do not divide nodes, virtual shards; or if the recipe does not use the GPU step.
 */
LSA_NODISCARD lsa_status lsa_estimate_make(lsa_estimate *out, const lsa_recipe *r, const lsa_machine *m,
                                           lsa_err *err);
/* To stdout: a table in which every number says where it comes from; or one JSON object. */
void lsa_estimate_print(const lsa_estimate *e, const lsa_recipe *r, const lsa_machine *m);
LSA_NODISCARD lsa_status lsa_estimate_print_json(const lsa_estimate *e, const lsa_machine *m, lsa_err *err);

#endif
