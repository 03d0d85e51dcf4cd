// Any machine: vectors of four floats that the compiler lowers.
#define LMINF_ISA portable
#define LMINF_LANES 4
#define LMINF_BF16 0
#define LMINF_AMX 0
#include "isa.h"
#include "variant.h"
