---Seeds and random tensors. A stream of draws is (seed, count of draws so far): nothing else, so a
---checkpoint holds it in two numbers and a resumed run draws the same bits.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local tensors = require("quartermoon.tensor")
local lib = binding.lib

local M = {}

---@class qm.Generator
---@field seed integer
---@field draws integer  how many tensors were drawn
local Generator = {}
Generator.__index = Generator

---A source of random tensors of its own.
---@param seed integer  0 .. 2^32 - 1
---@param draws integer|nil  where to continue
function M.generator(seed, draws)
  check.integer("qm.generator", "seed", seed, 0, 2 ^ 32 - 1)
  return setmetatable({ seed = seed, draws = check.integer("qm.generator", "draws", draws or 0, 0, 2 ^ 32 - 1) },
    Generator)
end

M.default = M.generator(0)

---Seed the generator that qm.rand, qm.randn and the layers' initial values draw from.
function M.seed(seed)
  check.integer("qm.seed", "seed", seed, 0, 2 ^ 32 - 1)
  M.default.seed, M.default.draws = seed, 0
end

---The next draw's random bits, as the kernels take them.
function Generator:next_noise()
  if package.loaded["quartermoon.graph"] and package.loaded["quartermoon.graph"].recording() then
    binding.raise("a graph is being recorded: random numbers cannot be part of it (every replay would draw the same "
      .. "ones): draw outside and pass the tensor in")
  end
  local noise = ffi.new("qm_noise", self.seed, self.draws, 0, ffi.C.QM_STREAM_USER)
  self.draws = (self.draws + 1) % 2 ^ 32
  return noise
end

local function draw(name, generator, kind, shape, a, b, options)
  check.number(name, "a", a)
  check.number(name, "b", b)
  local tensor = tensors.empty(shape, options)
  binding.check(lib.qm_random(tensor.desc, kind, a, b, generator:next_noise()), name, tensor)
  return tensor
end

---Uniform in [low, high). @param low number|nil 0. @param high number|nil 1
function Generator:rand(shape, options, low, high)
  return draw("rand", self, ffi.C.QM_UNIFORM, shape, low or 0, high or 1, options)
end
---Normal. @param mean number|nil 0. @param deviation number|nil 1
function Generator:randn(shape, options, mean, deviation)
  return draw("randn", self, ffi.C.QM_NORMAL, shape, mean or 0, deviation or 1, options)
end
---A Lua number, uniform in [0, 1).
function Generator:number()
  local tensor = self:rand({ 1 }, { device = "cpu" })
  local value = tensor:item()
  tensor:free()
  return value
end

---Uniform in [low, high), from the default generator: see Generator:rand.
function M.rand(shape, options, low, high) return M.default:rand(shape, options, low, high) end
---Normal, from the default generator: see Generator:randn.
function M.randn(shape, options, mean, deviation) return M.default:randn(shape, options, mean, deviation) end

M.Generator = Generator

check.methods("qm.Generator", Generator)

return M
