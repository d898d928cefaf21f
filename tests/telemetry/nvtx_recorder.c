/* An NVTX tool that writes what it is told to a file, one JSON object a line.
 *
 *     gcc -shared -fPIC -O1 -o recorder.so nvtx_recorder.c
 *     NVTX_INJECTION64_PATH=./recorder.so NVTX_RECORDING=ranges.jsonl python program.py
 *
 * NVTX loads the library with its first call and hands it tables of its functions, in which the tool puts its own.
 * What of NVTX 3's binary interface is needed is declared here, so that no header is. Messages and names are written as
 * they come: those of this project have nothing that JSON would have escaped.
 */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

typedef struct {
  uint16_t version, size;
  uint32_t category;
  int32_t color_type;
  uint32_t color;
  int32_t payload_type, reserved;
  union {
    int64_t whole;
    double real;
    int32_t small;
  } payload;
  int32_t message_type;
  union {
    const char *ascii;
    const char *const *registered; /* ours: see register_string */
  } message;
} Attributes;

enum { MESSAGE_ASCII = 1, MESSAGE_REGISTERED = 3 };
enum { PAYLOAD_UINT64 = 1, PAYLOAD_INT64 = 2, PAYLOAD_DOUBLE = 3, PAYLOAD_UINT32 = 4, PAYLOAD_INT32 = 5 };

typedef void (*Function)(void);
typedef struct {
  size_t size;
  int (*functions_of)(int module, Function ***table, unsigned *length);
} Callbacks;

enum { CALLBACKS = 1, MODULE_DOMAINS = 5 };
/* places in the table of the functions that take a domain */
enum { PUSH = 4, POP = 5, NAME_CATEGORY = 8, REGISTER_STRING = 10, CREATE = 12 };

static FILE *out;

static long long nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static long thread(void) { return syscall(SYS_gettid); }

static const char *text_of(const Attributes *range) {
  if (range->message_type == MESSAGE_REGISTERED) return *range->message.registered;
  return range->message_type == MESSAGE_ASCII ? range->message.ascii : "";
}

static int push(const char *domain, const Attributes *range) {
  char payload[32] = "null";
  switch (range->payload_type) {
    case PAYLOAD_UINT64:
    case PAYLOAD_INT64: snprintf(payload, sizeof payload, "%lld", (long long)range->payload.whole); break;
    case PAYLOAD_DOUBLE: snprintf(payload, sizeof payload, "%.17g", range->payload.real); break;
    case PAYLOAD_UINT32:
    case PAYLOAD_INT32: snprintf(payload, sizeof payload, "%d", range->payload.small); break;
  }
  fprintf(out, "{\"event\": \"push\", \"at\": %lld, \"thread\": %ld, \"domain\": \"%s\", \"message\": \"%s\", "
               "\"category\": %u, \"color\": %u, \"payload\": %s}\n",
          nanoseconds(), thread(), domain, text_of(range), range->category, range->color, payload);
  return 0;
}

static int pop(const char *domain) {
  fprintf(out, "{\"event\": \"pop\", \"at\": %lld, \"thread\": %ld, \"domain\": \"%s\"}\n", nanoseconds(), thread(), domain);
  return 0;
}

/* A domain is its name. */
static const char *create(const char *name) { return strdup(name); }

static void name_category(const char *domain, uint32_t number, const char *name) {
  fprintf(out, "{\"event\": \"category\", \"domain\": \"%s\", \"number\": %u, \"name\": \"%s\"}\n", domain, number, name);
}

static char **register_string(const char *domain, const char *text) {
  char **registered = malloc(sizeof *registered);
  (void)domain;
  *registered = strdup(text);
  return registered;
}

__attribute__((visibility("default"))) int InitializeInjectionNvtx2(const void *(*tables)(uint32_t)) {
  const Callbacks *callbacks = tables(CALLBACKS);
  const char *path = getenv("NVTX_RECORDING");
  Function **table;
  unsigned length;
  if (!path || !callbacks || !callbacks->functions_of(MODULE_DOMAINS, &table, &length) || length <= CREATE) return 0;
  if (!(out = fopen(path, "w"))) return 0;
  setvbuf(out, NULL, _IOLBF, 1 << 16); /* whole lines, whichever thread writes and however the process ends */
  *table[PUSH] = (Function)push;
  *table[POP] = (Function)pop;
  *table[NAME_CATEGORY] = (Function)name_category;
  *table[REGISTER_STRING] = (Function)register_string;
  *table[CREATE] = (Function)create;
  return 1;
}
