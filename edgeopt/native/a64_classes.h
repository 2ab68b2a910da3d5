/* What kind of work an A64 instruction does, decided from its 32 bits.
 *
 * Each row is a bit pattern in the order of the Arm Architecture Reference Manual's encoding tables (DDI 0487, chapter
 * "A64 Instruction Set Encoding"): bit 31 on the left, '.' for a bit that does not matter, blanks for the eye. The
 * first row that fits decides, so special cases stand before the group they belong to. What fits no row is "other".
 * Patterns stay text, because that is how they can be checked against the manual; they are turned into masks once.
 */
#ifndef EDGEOPT_A64_CLASSES_H
#define EDGEOPT_A64_CLASSES_H

#include <stddef.h>
#include <stdint.h>

enum a64_class {
    SCALAR_INT,
    SCALAR_FLOAT,
    NEON_INT,
    NEON_FLOAT,
    NEON_HALF,
    DOTPROD,
    I8MM,
    BF16,
    SVE,
    LOAD,
    STORE,
    BRANCH,
    OTHER,
    A64_CLASSES
};

static const char *const a64_class_names[A64_CLASSES] = {
    [SCALAR_INT] = "scalar-int", [SCALAR_FLOAT] = "scalar-float", [NEON_INT] = "neon-int",
    [NEON_FLOAT] = "neon-float", [NEON_HALF] = "neon-half",       [DOTPROD] = "dotprod",
    [I8MM] = "i8mm",             [BF16] = "bf16",                 [SVE] = "sve",
    [LOAD] = "load",             [STORE] = "store",               [BRANCH] = "branch",
    [OTHER] = "other",
};

struct a64_row {
    const char *pattern;
    enum a64_class class;
};

static const struct a64_row a64_rows[] = {
    /* Data processing, immediate (bits 28:26 = 100) and register (27:25 = 101): moves, adds, shifts, multiplies. */
    {"... 100 .. ........ ........ ........", SCALAR_INT},
    {".... 101 . ........ ........ ........", SCALAR_INT},

    /* Branches (28:26 = 101). Exceptions, hints, barriers and system registers are "other". */
    {". 00101 .. ........ ........ ........", BRANCH}, /* B, BL */
    {". 01101 .. ........ ........ ........", BRANCH}, /* CBZ, CBNZ, TBZ, TBNZ */
    {". 11101 .. ........ ........ ........", BRANCH}, /* CB<cc> (FEAT_CMPBR) */
    {"0101 0100 ........ ........ ........", BRANCH},  /* B.<cond>, BC.<cond> */
    {"1101 011 . ........ ........ ........", BRANCH}, /* BR, BLR, RET and their PAC forms */
    {"... 101 .. ........ ........ ........", OTHER},

    /* Loads and stores (27 = 1, 25 = 0). Prefetches and read-modify-write atomics are "other". */
    {"0. 00110 . .1 ...... ........ ........", LOAD},  /* LD1-LD4, LD1R: several or single structures */
    {"0. 00110 . .0 ...... ........ ........", STORE}, /* ST1-ST4 */
    {".. 001000 1.1 ..... . 11111 .....  .....", OTHER}, /* CAS */
    {"0. 001000 0.1 ..... . 11111 .....  .....", OTHER}, /* CASP */
    {".. 001000 .1 ...... ........ ........", LOAD},     /* LDXR, LDAXR, LDAR, LDXP */
    {".. 001000 .0 ...... ........ ........", STORE},    /* STXR, STLXR, STLR, STXP */
    {"11 011 0 00 ........ ........ ........", OTHER},   /* PRFM (literal) */
    {".. 011 . 00 ........ ........ ........", LOAD},    /* LDR (literal) */
    {"11 011001 ..1 ..... ........ ........", OTHER},    /* memory tags */
    {".. 011001 000 ..... .... 00 .. ........", STORE},  /* STLUR */
    {".. 011001 ..0 ..... .... 00 .. ........", LOAD},   /* LDAPUR */
    {".. 011 . 01 ........ ........ ........", OTHER},   /* memory copy and set */
    {".. 101 . 0 .. 1 ...... ........ ........", LOAD},  /* LDP, LDNP */
    {".. 101 . 0 .. 0 ...... ........ ........", STORE}, /* STP, STNP */
    {"11 111 0 01 10 ...... ........ ........", OTHER},  /* PRFM (unsigned offset) */
    {"11 111 0 00 10 0 ..... .... 00 .. ........", OTHER}, /* PRFUM */
    {"11 111 0 00 10 1 ..... .... 10 .. ........", OTHER}, /* PRFM (register) */
    {".. 111 0 00 101 ..... 1100 00 .. ........", LOAD},   /* LDAPR */
    {".. 111 0 00 .. 1 ..... .... 00 .. ........", OTHER}, /* LDADD, SWP and the other atomics */
    {"11 111 0 00 .. 1 ..... .... .1 .. ........", LOAD},  /* LDRAA, LDRAB */
    {".. 111 0 0 . 00 ...... ........ ........", STORE},   /* STR, STUR, STRB, STRH of general registers */
    {".. 111 0 0 . .. ...... ........ ........", LOAD},    /* LDR, LDUR, LDRSB, ... */
    {".. 111 1 0 . .0 ...... ........ ........", STORE},   /* STR, STUR of SIMD registers */
    {".. 111 1 0 . .1 ...... ........ ........", LOAD},    /* LDR, LDUR of SIMD registers */

    /* SVE (28:25 = 0010) and SME (31 = 1, 28:25 = 0000). Prefetches first, as above. */
    {"1000010 00 . 1 ..... 0 .. ... ..... 0 ....", OTHER},  /* PRF* 32-bit gather, scaled */
    {"1000010 .. 00 ..... 11. ... ..... 0 ....", OTHER},    /* PRF* scalar + scalar, vector + immediate */
    {"1000010 11 1 ...... 0 .. ... ..... 0 ....", OTHER},   /* PRF* scalar + immediate */
    {"1100010 00 . 1 ..... 0 .. ... ..... 0 ....", OTHER},  /* PRF* 64-bit gather, unpacked */
    {"1100010 00 11 ..... 1 .. ... ..... 0 ....", OTHER},   /* PRF* 64-bit gather, scaled */
    {"1100010 .. 00 ..... 111 ... ..... 0 ....", OTHER},    /* PRF* 64-bit vector + immediate */
    {"111 0010 . ........ ........ ........", STORE},
    {"1.. 0010 . ........ ........ ........", LOAD},
    {"... 0010 . ........ ........ ........", SVE},
    {"111 0000 ...1 ..... ........ ........", STORE}, /* SME: ST1 from a tile, STR of ZA */
    {"111 0000 ...0 ..... ........ ........", LOAD},
    {"1.. 0000 . ........ ........ ........", SVE},

    /* Scalar floating point (30 = 0, 28 = 1, 27:25 = 111): arithmetic, compare, convert, moves to and from X. */
    {". 0 . 1111 . ........ ........ ........", SCALAR_FLOAT},

    /* Advanced SIMD, three registers, extension: the instructions that matter to quantized models. */
    {"0.. 01110 10 0 ..... 1 0010 1 ..... .....", DOTPROD},    /* SDOT, UDOT */
    {"0.0 01110 10 0 ..... 1 0011 1 ..... .....", DOTPROD},    /* USDOT */
    {"0.. 01110 10 0 ..... 1 0100 1 ..... .....", I8MM},       /* SMMLA, UMMLA */
    {"0.0 01110 10 0 ..... 1 0101 1 ..... .....", I8MM},       /* USMMLA */
    {"0.1 01110 01 0 ..... 1 1101 1 ..... .....", BF16},       /* BFMMLA */
    {"0.1 01110 .1 0 ..... 1 1111 1 ..... .....", BF16},       /* BFDOT, BFMLALB, BFMLALT */
    {"0.1 01110 01 0 ..... 1 10.. 1 ..... .....", NEON_HALF},  /* FCMLA */
    {"0.1 01110 01 0 ..... 1 11.0 1 ..... .....", NEON_HALF},  /* FCADD */
    {"0.1 01110 .. 0 ..... 1 10.. 1 ..... .....", NEON_FLOAT}, /* FCMLA */
    {"0.1 01110 .. 0 ..... 1 11.0 1 ..... .....", NEON_FLOAT}, /* FCADD */

    /* Advanced SIMD, one element by vector: the same kinds with a lane index. */
    {"0.. 01111 10 ...... 1110 . 0 ..... .....", DOTPROD},    /* SDOT, UDOT */
    {"0.0 01111 .0 ...... 1111 . 0 ..... .....", DOTPROD},    /* SUDOT, USDOT */
    {"0.0 01111 .1 ...... 1111 . 0 ..... .....", BF16},       /* BFDOT, BFMLALB, BFMLALT */
    {"0.0 01111 00 ...... 0.01 . 0 ..... .....", NEON_HALF},  /* FMLA, FMLS */
    {"0.. 01111 00 ...... 1001 . 0 ..... .....", NEON_HALF},  /* FMUL, FMULX */
    {"0.1 01111 01 ...... 0..1 . 0 ..... .....", NEON_HALF},  /* FCMLA */
    {"0.0 01111 .. ...... 0.01 . 0 ..... .....", NEON_FLOAT}, /* FMLA, FMLS */
    {"0.. 01111 .. ...... 1001 . 0 ..... .....", NEON_FLOAT}, /* FMUL, FMULX */
    {"0.1 01111 .. ...... 0..1 . 0 ..... .....", NEON_FLOAT}, /* FCMLA */
    {"0.0 01111 .. ...... 0.00 . 0 ..... .....", NEON_FLOAT}, /* FMLAL, FMLSL */
    {"0.1 01111 .. ...... 1.00 . 0 ..... .....", NEON_FLOAT}, /* FMLAL2, FMLSL2 */
    {"01. 11111 .. ...... 0.01 . 0 ..... .....", SCALAR_FLOAT},
    {"01. 11111 .. ...... 1001 . 0 ..... .....", SCALAR_FLOAT},

    /* Advanced SIMD, three registers of one kind: opcodes from 11000 are floating point. */
    {"0.. 01110 . 10 ..... 00 ... 1 ..... .....", NEON_HALF},
    {"01. 11110 . 10 ..... 00 ... 1 ..... .....", SCALAR_FLOAT},
    {"0.. 01110 .. 1 ..... 11 ... 1 ..... .....", NEON_FLOAT},
    {"01. 11110 .. 1 ..... 11 ... 1 ..... .....", SCALAR_FLOAT},

    /* Advanced SIMD, two registers: opcodes 011xx, 1011x and 11xxx are floating point or convert from or to it. */
    {"0.. 01110 1 . 10000 11100 10 ..... .....", NEON_INT}, /* URECPE, URSQRTE */
    {"0.. 01110 . 111100 ..... 10 ..... .....", NEON_HALF},
    {"01. 11110 . 111100 ..... 10 ..... .....", SCALAR_FLOAT},
    {"0.. 01110 .. 10000 011.. 10 ..... .....", NEON_FLOAT},
    {"01. 11110 .. 10000 011.. 10 ..... .....", SCALAR_FLOAT},
    {"0.. 01110 .. 10000 1011. 10 ..... .....", NEON_FLOAT},
    {"01. 11110 .. 10000 1011. 10 ..... .....", SCALAR_FLOAT},
    {"0.. 01110 .. 10000 11... 10 ..... .....", NEON_FLOAT},
    {"01. 11110 .. 10000 11... 10 ..... .....", SCALAR_FLOAT},

    /* Advanced SIMD, across lanes and pairwise: FMAXNMV, FMAXV, FADDP, ... */
    {"0.0 01110 .. 11000 011.. 10 ..... .....", NEON_HALF},
    {"0.1 01110 .. 11000 011.. 10 ..... .....", NEON_FLOAT},
    {"01. 11110 .. 11000 011.. 10 ..... .....", SCALAR_FLOAT},

    /* Advanced SIMD, fixed point conversions; immh = 0000 is a modified immediate (MOVI, FMOV) instead. */
    {"0.. 01111 00000 ... ..... 1 ..... .....", NEON_INT},
    {"0.. 01111 0 ....... 111.. 1 ..... .....", NEON_FLOAT},
    {"01. 11111 0 ....... 111.. 1 ..... .....", SCALAR_FLOAT},

    /* The rest of Advanced SIMD: integer arithmetic, logic, shifts, permutes, moves; then SHA and AES. */
    {"0... 111 . ........ ........ ........", NEON_INT},
    {"1100 1110 ........ ........ ........", NEON_INT},
};

#define A64_ROWS (sizeof a64_rows / sizeof a64_rows[0])

struct a64_masks {
    uint32_t mask[A64_ROWS];
    uint32_t value[A64_ROWS];
};

/* Turn the patterns into masks. Returns the index of a row that does not have 32 bits, or -1 when all are sound. */
static inline int a64_prepare(struct a64_masks *masks) {
    for (size_t row = 0; row < A64_ROWS; ++row) {
        uint32_t mask = 0, value = 0;
        int bits = 0;
        for (const char *at = a64_rows[row].pattern; *at; ++at) {
            if (*at == ' ') continue;
            if (*at != '.' && *at != '0' && *at != '1') return (int)row;
            mask = mask << 1 | (*at != '.');
            value = value << 1 | (*at == '1');
            ++bits;
        }
        if (bits != 32) return (int)row;
        masks->mask[row] = mask;
        masks->value[row] = value;
    }
    return -1;
}

static inline enum a64_class a64_classify(const struct a64_masks *masks, uint32_t instruction) {
    for (size_t row = 0; row < A64_ROWS; ++row)
        if ((instruction & masks->mask[row]) == masks->value[row]) return a64_rows[row].class;
    return OTHER;
}

#endif
