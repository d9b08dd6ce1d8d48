/* The text of check_indexer.py, put into the program when it is built, so that every exported folder carries
 * the checker that fits its golden vectors. */
#ifndef LSA_EXPORT_CHECKER_H
#define LSA_EXPORT_CHECKER_H

#include <stddef.h>

extern const unsigned char lsa_checker_text[];
extern const size_t lsa_checker_bytes;

#endif
