/* A plugin for qemu's TCG that counts the instructions of each inference, by kind of work.
 *
 *   qemu-aarch64 -plugin counter.so,out=FILE PROGRAM ...
 *
 * The program makes the system call prctl(0x45444F50, 1) before each inference and prctl(0x45444F50, 0) after it.
 * Every translated block carries one inline counter of its executions, so counting costs one addition per block and
 * no call. What a block consists of is known when it is translated, so executions times contents gives the counts of
 * each class. At the end the plugin writes FILE, one JSON object:
 *
 *   {"threads": 1,
 *    "classes": ["scalar-int", ...],
 *    "inferences": [[n, ...], ...],       instructions of each inference, in the order of "classes"
 *    "files": ["/path/libx.so", ...],     what the code below was mapped from
 *    "blocks": [[file, offset, executions, "code", "kinds"], ...]}
 *
 * "blocks" are those that the last inference executed; "file" is an index into "files" or -1, "offset" the place in
 * that file, "code" the instructions' bytes in hexadecimal, "kinds" one letter per instruction: 'a' for the first of
 * "classes", 'b' for the second, ... Blocks may overlap: a jump into the middle of one starts another.
 *
 * Build:  cc -std=gnu11 -O2 -fPIC -shared -nostdlib -Wall -Wextra -Werror -o counter.so counter.c
 *
 * Why -nostdlib: the emulator may run on another, older glibc than the compiler's. A plugin that is linked against
 * libc.so asks for the newest version of each function that the build machine has. Left undefined and unversioned,
 * the names are found at load time in the C library and in the qemu that the process already holds. For the same
 * reason nothing here uses stat, threads, or strtol and scanf, which headers rename from release to release.
 *
 * Counters are plain additions: with several threads in the guest they lose some. "threads" tells.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "a64_classes.h"

/* qemu's plugin interface, version 1 (qemu 4.2 to 8.2), as far as it is used here. No package ships its header. */
#define EXPORT __attribute__((visibility("default")))
typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct plugin_info {
    const char *target_name;
    struct {
        int min, cur;
    } version;
    bool system_emulation;
};
enum { INLINE_ADD_U64 = 0 };

extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
extern struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *block, size_t index);
extern const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *instruction);
extern uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *instruction);
extern void *qemu_plugin_insn_haddr(const struct qemu_plugin_insn *instruction);
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *block, int op, void *counter, uint64_t by);
extern void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, void (*callback)(plugin_id, struct qemu_plugin_tb *));
extern void qemu_plugin_register_vcpu_init_cb(plugin_id id, void (*callback)(plugin_id, unsigned));
extern void qemu_plugin_register_vcpu_syscall_cb(plugin_id id, void (*callback)(plugin_id, unsigned, int64_t, uint64_t,
                                                                               uint64_t, uint64_t, uint64_t, uint64_t,
                                                                               uint64_t, uint64_t, uint64_t));
extern void qemu_plugin_register_atexit_cb(plugin_id id, void (*callback)(plugin_id, void *), void *data);
extern void qemu_plugin_outs(const char *text);

EXPORT int qemu_plugin_version = 1;

enum { SYSCALL_PRCTL = 167, MARK = 0x45444F50, MARK_END = 0, MARK_BEGIN = 1 };

struct block {
    uint64_t executions;   /* since the start; written by translated code, so a block never moves */
    uint64_t at_begin;     /* executions when the current inference began */
    uint64_t in_inference; /* executions during the last complete inference */
    uint64_t address;      /* in the guest */
    const char *host;      /* where the first instruction lies in this process */
    uint32_t length;       /* instructions */
    uint16_t contents[A64_CLASSES];
    uint32_t code[];
};

struct inference {
    uint64_t counts[A64_CLASSES];
};

static struct {
    struct a64_masks masks;
    char *out;
    unsigned threads;
    bool inside;
    char lock;
    struct block **table; /* open addressing; a power of two slots, at most half of them taken */
    size_t slots, taken;
    struct inference *inferences;
    size_t n_inferences;
} state;

static void lock(void) {
    while (__atomic_test_and_set(&state.lock, __ATOMIC_ACQUIRE)) continue;
}

static void unlock(void) { __atomic_clear(&state.lock, __ATOMIC_RELEASE); }

/* A count that is quietly wrong is worse than none: out of memory ends the run. */
static void *checked(void *memory) {
    if (memory == NULL) {
        qemu_plugin_outs("counter: out of memory\n");
        abort();
    }
    return memory;
}

static bool same_code(const struct block *a, const struct block *b) {
    return a->address == b->address && a->length == b->length &&
           memcmp(a->code, b->code, a->length * sizeof a->code[0]) == 0;
}

static uint64_t hash_of(const struct block *block) {
    uint64_t hash = block->address * 0x9E3779B97F4A7C15u + block->length;
    for (uint32_t i = 0; i < block->length; ++i) hash = (hash ^ block->code[i]) * 0x100000001B3u;
    return hash ^ hash >> 32;
}

static struct block **slot_of(struct block **table, size_t slots, const struct block *block) {
    size_t at = hash_of(block) & (slots - 1);
    while (table[at] != NULL && !same_code(table[at], block)) at = (at + 1) & (slots - 1);
    return &table[at];
}

static void grow_table(void) {
    size_t slots = state.slots ? 2 * state.slots : 1 << 16;
    struct block **table = checked(calloc(slots, sizeof *table));
    for (size_t i = 0; i < state.slots; ++i)
        if (state.table[i] != NULL) *slot_of(table, slots, state.table[i]) = state.table[i];
    free(state.table);
    state.table = table;
    state.slots = slots;
}

/* qemu forgets all translations when its buffer is full and translates anew: the same code keeps its counter. */
static struct block *remember(struct block *block) {
    if (2 * (state.taken + 1) > state.slots) grow_table();
    struct block **slot = slot_of(state.table, state.slots, block);
    if (*slot != NULL) {
        free(block);
        return *slot;
    }
    *slot = block;
    ++state.taken;
    return block;
}

static void on_translation(plugin_id id, struct qemu_plugin_tb *translated) {
    (void)id;
    size_t length = qemu_plugin_tb_n_insns(translated);
    struct block *block = checked(calloc(1, sizeof *block + length * sizeof block->code[0]));
    block->length = (uint32_t)length;
    for (size_t i = 0; i < length; ++i) {
        const struct qemu_plugin_insn *instruction = qemu_plugin_tb_get_insn(translated, i);
        memcpy(&block->code[i], qemu_plugin_insn_data(instruction), sizeof block->code[i]);
        ++block->contents[a64_classify(&state.masks, block->code[i])];
        if (i == 0) {
            block->address = qemu_plugin_insn_vaddr(instruction);
            block->host = qemu_plugin_insn_haddr(instruction);
        }
    }
    lock();
    block = remember(block);
    unlock();
    qemu_plugin_register_vcpu_tb_exec_inline(translated, INLINE_ADD_U64, &block->executions, 1);
}

static void begin_inference(void) {
    for (size_t i = 0; i < state.slots; ++i)
        if (state.table[i] != NULL) state.table[i]->at_begin = state.table[i]->executions;
    state.inside = true;
}

static void end_inference(void) {
    size_t size = (state.n_inferences + 1) * sizeof *state.inferences;
    state.inferences = checked(realloc(state.inferences, size));
    struct inference *inference = &state.inferences[state.n_inferences++];
    memset(inference, 0, sizeof *inference);
    for (size_t i = 0; i < state.slots; ++i) {
        struct block *block = state.table[i];
        if (block == NULL) continue;
        block->in_inference = block->executions - block->at_begin;
        for (int class = 0; class < A64_CLASSES; ++class)
            inference->counts[class] += block->in_inference * block->contents[class];
    }
    state.inside = false;
}

static void on_syscall(plugin_id id, unsigned vcpu, int64_t number, uint64_t a1, uint64_t a2, uint64_t a3, uint64_t a4,
                       uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8) {
    (void)id, (void)vcpu, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    if (number != SYSCALL_PRCTL || a1 != MARK) return;
    lock();
    if (a2 == MARK_BEGIN) begin_inference();
    if (a2 == MARK_END && state.inside) end_inference();
    unlock();
}

static void on_thread(plugin_id id, unsigned vcpu) {
    (void)id, (void)vcpu;
    __atomic_add_fetch(&state.threads, 1, __ATOMIC_RELAXED);
}

/* One line of /proc/self/maps: a stretch of this process' memory that shows a file. */
struct mapping {
    const char *from, *to;
    uint64_t offset;
    char *path;
    long number; /* of the file; a library is mapped in several pieces, which share it */
};

struct mappings {
    struct mapping *items;
    size_t count;
    long files;
};

static uint64_t hexadecimal(const char **at) {
    uint64_t value = 0;
    for (;; ++*at) {
        char c = **at;
        if (c >= '0' && c <= '9') value = value << 4 | (uint64_t)(c - '0');
        else if (c >= 'a' && c <= 'f') value = value << 4 | (uint64_t)(c - 'a' + 10);
        else return value;
    }
}

static struct mappings read_mappings(void) {
    struct mappings mappings = {NULL, 0, 0};
    FILE *file = fopen("/proc/self/maps", "r");
    if (file == NULL) return mappings;
    char line[8192];
    while (fgets(line, sizeof line, file) != NULL) {
        /* 7f00-7f80 r-xp 00001000 fd:01 1234    /usr/lib/libx.so */
        const char *at = line;
        uint64_t from = hexadecimal(&at);
        ++at;
        uint64_t to = hexadecimal(&at);
        at += strlen(" r-xp ");
        uint64_t offset = hexadecimal(&at);
        char *path = strchr(at, '/'), *end = strchr(at, '\n');
        if (path == NULL || end == NULL) continue;
        *end = '\0';
        long number = mappings.files;
        for (size_t i = 0; i < mappings.count; ++i)
            if (strcmp(mappings.items[i].path, path) == 0) number = mappings.items[i].number;
        if (number == mappings.files) ++mappings.files;
        mappings.items = checked(realloc(mappings.items, (mappings.count + 1) * sizeof *mappings.items));
        mappings.items[mappings.count++] = (struct mapping){
            .from = (const char *)(uintptr_t)from,
            .to = (const char *)(uintptr_t)to,
            .offset = offset,
            .path = strcpy(checked(malloc(strlen(path) + 1)), path),
            .number = number,
        };
    }
    fclose(file);
    return mappings;
}

static const struct mapping *mapping_of(const struct mappings *mappings, const char *host) {
    for (size_t i = 0; i < mappings->count; ++i)
        if (host >= mappings->items[i].from && host < mappings->items[i].to) return &mappings->items[i];
    return NULL;
}

static void write_string(FILE *file, const char *text) {
    fputc('"', file);
    for (; *text; ++text) {
        unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\' || c < 0x20) fprintf(file, "\\u%04x", c);
        else fputc(c, file);
    }
    fputc('"', file);
}

static void write_counts(FILE *file) {
    fprintf(file, "{\"threads\": %u,\n\"classes\": [", state.threads);
    for (int class = 0; class < A64_CLASSES; ++class) {
        if (class) fputs(", ", file);
        write_string(file, a64_class_names[class]);
    }
    fputs("],\n\"inferences\": [", file);
    for (size_t i = 0; i < state.n_inferences; ++i) {
        fputs(i ? ",\n[" : "[", file);
        for (int class = 0; class < A64_CLASSES; ++class)
            fprintf(file, class ? ", %llu" : "%llu", (unsigned long long)state.inferences[i].counts[class]);
        fputc(']', file);
    }
    fputs("],\n", file);
}

static void write_block(FILE *file, const struct block *block, const struct mappings *mappings) {
    const struct mapping *mapping = mapping_of(mappings, block->host);
    uint64_t offset = mapping ? mapping->offset + (uint64_t)(block->host - mapping->from) : block->address;
    fprintf(file, "[%ld, %llu, %llu, \"", mapping ? mapping->number : -1L,
            (unsigned long long)offset, (unsigned long long)block->in_inference);
    for (uint32_t i = 0; i < block->length; ++i) {
        const unsigned char *byte = (const unsigned char *)&block->code[i];
        fprintf(file, "%02x%02x%02x%02x", byte[0], byte[1], byte[2], byte[3]);
    }
    fputs("\", \"", file);
    for (uint32_t i = 0; i < block->length; ++i) fputc('a' + (int)a64_classify(&state.masks, block->code[i]), file);
    fputs("\"]", file);
}

static void write_blocks(FILE *file) {
    struct mappings mappings = read_mappings();
    fputs("\"files\": [", file);
    long written = 0;
    for (size_t i = 0; i < mappings.count; ++i) {
        if (mappings.items[i].number < written) continue;
        if (written++) fputs(", ", file);
        write_string(file, mappings.items[i].path);
    }
    fputs("],\n\"blocks\": [", file);
    bool first = true;
    for (size_t i = 0; i < state.slots; ++i) {
        if (state.table[i] == NULL || state.table[i]->in_inference == 0) continue;
        if (!first) fputs(",\n", file);
        first = false;
        write_block(file, state.table[i], &mappings);
    }
    fputs("]}\n", file);
}

static void on_exit_of_guest(plugin_id id, void *data) {
    (void)id, (void)data;
    FILE *file = fopen(state.out, "w");
    if (file == NULL) {
        qemu_plugin_outs("counter: the output file can't be written\n");
        return;
    }
    write_counts(file);
    write_blocks(file);
    if (fclose(file) != 0) remove(state.out); /* a full disk: no file is clearer than half of one */
}

EXPORT int qemu_plugin_install(plugin_id id, const struct plugin_info *info, int argc, char **argv) {
    if (info->system_emulation || strcmp(info->target_name, "aarch64") != 0) {
        fputs("counter: only for qemu-aarch64 in user mode\n", stderr);
        return -1;
    }
    if (argc != 1 || strncmp(argv[0], "out=", 4) != 0) {
        fputs("counter: needs exactly one argument, out=FILE\n", stderr);
        return -1;
    }
    int row = a64_prepare(&state.masks);
    if (row >= 0) {
        fprintf(stderr, "counter: malformed pattern %s\n", a64_rows[row].pattern);
        return -1;
    }
    state.out = strcpy(checked(malloc(strlen(argv[0] + 4) + 1)), argv[0] + 4);
    qemu_plugin_register_vcpu_init_cb(id, on_thread);
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    qemu_plugin_register_vcpu_syscall_cb(id, on_syscall);
    qemu_plugin_register_atexit_cb(id, on_exit_of_guest, NULL);
    return 0;
}
