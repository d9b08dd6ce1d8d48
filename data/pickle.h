/* A reader of pickled dicts of torch tensors that cannot run anything: it knows the opcodes and the few
 * globals that such a dict needs (collections.OrderedDict, torch._utils._rebuild_tensor_v2, torch.*Storage,
 * in plain pickles torch.storage._load_from_bytes) and refuses every other with its name. Time and memory are
 * linear in the pickle; nothing recurses. */
#ifndef LSA_DATA_PICKLE_H
#define LSA_DATA_PICKLE_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/core/dtype.h"
#include "kernels/core/lsa_status.h"

#define LSA_PICKLE_MAX_DIM 8

typedef struct lsa_pickle_tensor {
    char name[128];            /* key in the dict */
    char storage[32];          /* key of its storage: the archive's entry data/<storage> */
    const unsigned char *data; /* plain pickles: its storage, inside the pickle, not aligned; else NULL */
    lsa_dtype dtype;
    int32_t n_dim;
    int64_t shape[LSA_PICKLE_MAX_DIM];
    int64_t offset;    /* first element in the storage */
    int64_t n_elem;    /* of the tensor; offset + n_elem <= storage_n */
    int64_t storage_n; /* elements of the storage */
} lsa_pickle_tensor;

/* The pickle inside a torch.save archive: tensors of the dict in its order: (*out)[*n], freed by lsa_free. A
 * dict that holds a dict under `model_state` (an epoch checkpoint) means that one; values that are not
 * tensors are passed over. LSA_E_FORMAT: anything but a dict with names as keys, a name twice, a tensor that
 * is not contiguous or leaves its storage; `where` names the file. */
LSA_NODISCARD lsa_status lsa_pickle_tensors(lsa_pickle_tensor **out, int64_t *n, const void *data,
                                            size_t n_bytes, const char *where, lsa_err *err);

/* The same for what pickle.dump makes of a dict of tensors (protocols 3 to 5), where each storage is bytes in
 * the pickle: `data` points to them and lives as long as the caller's memory. The dict itself is meant,
 * whatever its keys. */
LSA_NODISCARD lsa_status lsa_pickle_plain(lsa_pickle_tensor **out, int64_t *n, const void *data,
                                          size_t n_bytes, const char *where, lsa_err *err);

#endif
