// Functions compiled for several instruction sets; the best one is chosen when the module is loaded.
#pragma once

// The same code for several instruction sets, where the compiler knows how; no result depends on which.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PENSTOCK_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define PENSTOCK_CLONES
#endif
