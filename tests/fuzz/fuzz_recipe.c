/* Recipes: any text gives a recipe inside its ranges or a message. What parses must survive being written and
 * read again. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/core/mem.h"
#include "trainer/recipe_keys.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    lsa_recipe r, again;
    lsa_err err = {0};
    if (lsa_recipe_parse(&r, lsa_recipe_keys, lsa_recipe_n_key, (const char *)data, n, "fuzz", &err) !=
        LSA_OK)
        return 0;
    char *text = NULL;
    if (lsa_recipe_text(&text, &r, lsa_recipe_keys, lsa_recipe_n_key, false, &err) != LSA_OK) return 0;
    if (lsa_recipe_parse(&again, lsa_recipe_keys, lsa_recipe_n_key, text, strlen(text), "again", &err) !=
        LSA_OK)
        abort();
    lsa_free(text);
    return 0;
}
