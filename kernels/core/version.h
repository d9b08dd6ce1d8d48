/* What this build is: version, commit, features. Text for --version; filled in by CMake. */
#ifndef LSA_KERNELS_CORE_VERSION_H
#define LSA_KERNELS_CORE_VERSION_H

const char *lsa_version(void);      /* "0.1.0" */
const char *lsa_version_text(void); /* several lines: version, commit, features, architectures */

#endif
