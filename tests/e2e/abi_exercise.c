/* Every function of lsa_indexer.h on a real export, and a refusal; for tests/e2e/test_abi_valgrind.sh. */
#include "tests/testkit/judge_export.h"

int main(int argc, char **argv) {
    char text[LSA_IDX_ERROR];
    lsa_idx *x = NULL, *y = NULL;
    const lsa_idx_options o = {"cpu", LSA_IDX_F32, 2, 100};
    if (argc < 3) return 2;
    for (int path = 0; path < 3; path++)
        if (lsa_judge_export(argv[1], path, text) != 1) {
            fprintf(stderr, "path %d: %s\n", path, text);
            return 1;
        }
    if (lsa_judge_export(argv[2], 0, text) != 0) return 1;
    if (lsa_idx_open(&x, LSA_IDX_ABI, argv[1], &o, text) || lsa_idx_clone(&y, x, text)) return 1;
    lsa_idx_close(x);
    lsa_idx_close(y);
    puts("exercised");
    return 0;
}
