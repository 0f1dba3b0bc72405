/* driver.c - libFuzzer drives Lua: the inputs of a target go to spec/fuzz/<target>.lua.
**
** One LuaJIT state lives as long as the process, its compiler off so that every line passes the
** hook: a line that is reached counts up one of libFuzzer's extra counters, and inputs that reach
** new lines stay in the corpus just as those do that reach new edges of the engine, whose C is
** instrumented. What counts as a finding is spec/fuzz/harness.lua's business; here it becomes an
** abort, which libFuzzer turns into a file with the input.
**
** QM_FUZZ_TARGET names the target, QM_FUZZ_FOLDER an empty folder for its files.
*/
#include <lauxlib.h>
#include <luajit.h>
#include <lualib.h>
#include <sanitizer/allocator_interface.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { COUNTERS = 1 << 15, SOURCES = 1 << 10 };

__attribute__((section("__libfuzzer_extra_counters"))) static uint8_t counters[COUNTERS];

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static lua_State *lua;
static int run; /* the harness's function, in the registry */

/* A file's number, by the address of its name, which Lua keeps as long as its functions: the hash
** of its text, so that a line counts in the same place in every process. */
__attribute__((no_sanitize("address", "undefined", "coverage"))) static uint32_t hash_of_source(
    const char *source) {
  static struct {
    const char *source;
    uint32_t hash;
  } known[SOURCES];
  const size_t slot = ((uintptr_t)source >> 4) % SOURCES;
  if (known[slot].source != source) {
    uint32_t hash = 2166136261u;
    for (const char *at = source; *at; at++) hash = (hash ^ (uint8_t)*at) * 16777619u;
    known[slot].source = source;
    known[slot].hash = hash;
  }
  return known[slot].hash;
}

__attribute__((no_sanitize("address", "undefined", "coverage"))) static void on_line(
    lua_State *state, lua_Debug *record) {
  lua_getinfo(state, "S", record);
  const uint32_t place =
      hash_of_source(record->source) + (uint32_t)record->currentline * 2654435761u;
  uint8_t *counter = &counters[(place ^ place >> 15) % COUNTERS];
  if (*counter < UINT8_MAX) (*counter)++;
}

/* Bytes that C holds; the harness looks for those that grow. */
static int allocated(lua_State *state) {
  lua_pushnumber(state, (double)__sanitizer_get_current_allocated_bytes());
  return 1;
}

/* The descriptor that the next file would get: it grows when one stays open. */
static int next_descriptor(lua_State *state) {
  const int descriptor = dup(0);
  if (descriptor >= 0) close(descriptor);
  lua_pushinteger(state, descriptor);
  return 1;
}

static _Noreturn void finding(void) {
  fprintf(stderr, "FINDING: %s\n", lua_tostring(lua, -1));
  abort();
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
  (void)argc, (void)argv;
  const char *target = getenv("QM_FUZZ_TARGET"), *folder = getenv("QM_FUZZ_FOLDER");
  lua = luaL_newstate();
  if (lua == NULL || target == NULL || folder == NULL) {
    fprintf(stderr, "QM_FUZZ_TARGET and QM_FUZZ_FOLDER are needed: use scripts/fuzz\n");
    exit(2);
  }
  luaL_openlibs(lua);
  luaJIT_setmode(lua, 0, LUAJIT_MODE_ENGINE | LUAJIT_MODE_OFF);
  lua_register(lua, "allocated", allocated);
  lua_register(lua, "next_descriptor", next_descriptor);
  if (luaL_loadfile(lua, "spec/fuzz/harness.lua") != 0) finding();
  lua_pushstring(lua, target);
  lua_pushstring(lua, folder);
  if (lua_pcall(lua, 2, 1, 0) != 0) finding();
  run = luaL_ref(lua, LUA_REGISTRYINDEX);
  lua_sethook(lua, on_line, LUA_MASKLINE, 0);
  return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  lua_rawgeti(lua, LUA_REGISTRYINDEX, run);
  lua_pushlstring(lua, (const char *)data, size);
  if (lua_pcall(lua, 1, 1, 0) != 0 || lua_isstring(lua, -1)) finding();
  lua_settop(lua, 0);
  return 0;
}
