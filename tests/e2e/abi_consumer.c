/* The ten-line consumer of the installed library: tests/e2e/test_abi_consumer.sh builds it. */
#include <lsa_indexer.h>
#include <stdio.h>
int main(int argc, char **argv) {
    char error[LSA_IDX_ERROR];
    lsa_idx *x;
    lsa_idx_info i;
    lsa_idx_options o = {"cpu", LSA_IDX_FP8, 1, 1024};
    if (lsa_idx_open(&x, LSA_IDX_ABI, argc > 1 ? argv[1] : ".", &o, error))
        return fprintf(stderr, "error: %s\n", error), 1;
    lsa_idx_get_info(x, &i);
    printf("%d joint layers of %d heads, hidden %d\n", i.n_layer, i.n_head, i.hidden);
    lsa_idx_close(x);
    return 0;
}
