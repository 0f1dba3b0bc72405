/* mutate.c - mutations that keep JSON in order, beside libFuzzer's own.
**
** Flipped bytes hardly ever leave a JSON text that a parser takes. Here values are exchanged,
** whole: for another value of the same text, for one that readers stumble over, or for nothing.
** Where the text is the header of a safetensors file, its length before it follows.
*/
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t size_max);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t size_max, unsigned seed);

typedef struct span {
  size_t begin, end;
} span;

enum { VALUES_MAX = 512, DEPTH_MAX = 64, LENGTH_BYTES = 8 };

static const char *const awkward[] = {
    "null",
    "true",
    "false",
    "0",
    "-1",
    "1",
    "2",
    "1.5",
    "1e308",
    "-1e308",
    "1e999",
    "2147483647",
    "2147483648",
    "4294967296",
    "9007199254740993",
    "9223372036854775807",
    "9223372036854775808",
    "-0",
    "nan",
    "infinity",
    "0x10",
    "\"\"",
    "\"x\"",
    "\"\\u0000\"",
    "\"\\ud800\"",
    "\"%s\"",
    "\"../x\"",
    "\"/\"",
    "[]",
    "{}",
    "[[]]",
    "[0]",
    "[\"x\"]",
    "[null]",
    "{\"x\":0}",
    "{\"\":null}",
    "[[[[[[[[[[[[[[[[0]]]]]]]]]]]]]]]]",
};

static uint32_t next_random(uint32_t *state) {
  *state ^= *state << 13, *state ^= *state >> 17, *state ^= *state << 5;
  return *state >> 3;
}

/* Where the string that begins at `at` ends. */
static size_t string_end(const uint8_t *data, size_t size, size_t at) {
  for (at++; at < size && data[at] != '"'; at++)
    if (data[at] == '\\') at++;
  return at < size ? at + 1 : size;
}

static bool is_word(uint8_t c) {
  return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '-' ||
         c == '+' || c == '.' || c == '_';
}

/* Strings, words and brackets with what they hold, from `from` on. */
static size_t find_values(const uint8_t *data, size_t size, size_t from, span *values) {
  size_t count = 0, depth = 0, open[DEPTH_MAX];
  for (size_t at = from; at < size && count < VALUES_MAX;) {
    const uint8_t c = data[at];
    const size_t begin = at;
    if (c == '"') {
      at = string_end(data, size, at);
    } else if (is_word(c)) {
      while (at < size && is_word(data[at])) at++;
    } else {
      at++;
      if ((c == '[' || c == '{') && depth < DEPTH_MAX) open[depth++] = begin;
      if ((c == ']' || c == '}') && depth > 0) values[count++] = (span){open[--depth], at};
      continue;
    }
    values[count++] = (span){begin, at};
  }
  return count;
}

/* The length that a safetensors file begins with, or 0. */
static uint64_t header_length(const uint8_t *data, size_t size) {
  uint64_t length = 0;
  if (size <= LENGTH_BYTES || data[LENGTH_BYTES] != '{') return 0;
  for (int i = 0; i < LENGTH_BYTES; i++) length |= (uint64_t)data[i] << (8 * i);
  return length <= size - LENGTH_BYTES ? length : 0;
}

/* Put `length` bytes in the place of a span. Returns the new size. */
static size_t replace(uint8_t *data, size_t size, span old, const void *bytes, size_t length) {
  memmove(data + old.begin + length, data + old.end, size - old.end);
  memcpy(data + old.begin, bytes, length);
  return size - (old.end - old.begin) + length;
}

/* With the comma beside it, the value goes; a member of an object goes with its name. */
static span without(const uint8_t *data, size_t size, span value) {
  size_t begin = value.begin, end = value.end;
  while (begin > 0 && data[begin - 1] != ',' && data[begin - 1] != '{' && data[begin - 1] != '[')
    begin--;
  if (end < size && data[end] == ',') return (span){begin, end + 1};
  if (begin > 0 && data[begin - 1] == ',') begin--;
  return (span){begin, end};
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t size_max, unsigned seed) {
  uint32_t random = seed * 2654435761u | 1;
  const uint64_t header = header_length(data, size);
  const size_t from = header > 0 ? LENGTH_BYTES : 0,
               to = header > 0 ? LENGTH_BYTES + (size_t)header : size;
  static span values[VALUES_MAX];
  const size_t count = next_random(&random) % 2 ? find_values(data, to, from, values) : 0;
  if (count == 0) return LLVMFuzzerMutate(data, size, size_max);
  static uint8_t copy[1 << 16];
  const span old = values[next_random(&random) % count],
             other = values[next_random(&random) % count];
  size_t length = 0;
  span place = old;
  switch (next_random(&random) % 6) {
    case 0:
    case 1: { /* another value of this text */
      length = other.end - other.begin;
      if (length > sizeof copy) return LLVMFuzzerMutate(data, size, size_max);
      memcpy(copy, data + other.begin, length);
      break;
    }
    case 2: { /* the value twice */
      length = 2 * (old.end - old.begin) + 1;
      if (length > sizeof copy) return LLVMFuzzerMutate(data, size, size_max);
      memcpy(copy, data + old.begin, old.end - old.begin);
      copy[old.end - old.begin] = ',';
      memcpy(copy + (old.end - old.begin) + 1, data + old.begin, old.end - old.begin);
      break;
    }
    case 3: place = without(data, to, old); break;
    default: {
      const char *word = awkward[next_random(&random) % (sizeof awkward / sizeof *awkward)];
      length = strlen(word);
      memcpy(copy, word, length);
    }
  }
  if (size - (place.end - place.begin) + length > size_max)
    return LLVMFuzzerMutate(data, size, size_max);
  const size_t now = replace(data, size, place, copy, length);
  if (header > 0 && next_random(&random) % 16 != 0) {
    const uint64_t fixed = header + now - size;
    for (int i = 0; i < LENGTH_BYTES; i++) data[i] = (uint8_t)(fixed >> (8 * i));
  }
  return now;
}
