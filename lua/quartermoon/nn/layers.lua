---Layers with parameters: Linear, QLinear, Embedding, RMSNorm, LayerNorm.

local check = require("quartermoon.check")
local module = require("quartermoon.nn.module")
local random = require("quartermoon.random")
local tensors = require("quartermoon.tensor")
local qm = require("quartermoon")

local M = {}

---Spread of fresh weights: keeps activations from growing or fading over many layers, and lies near
---where training takes them, which matters to a weight whose grid is fixed at the start.
local function default_std(inputs) return 0.7 / math.sqrt(inputs) end

---A fresh dense matrix from a generator.
local function draw(name, shape, std, options)
  check.number(name, "std", std, 0)
  return (options.generator or random.default):randn(shape, { dtype = options.dtype or "f32", device = options.device },
    0, std)
end

local function new_bias(outputs, options)
  return tensors.zeros({ outputs }, { device = options.device, requires_grad = true })
end

local function bias_of(self, size, options)
  module.parameter(self, "bias", { size }, function() return new_bias(size, options) end)
end

---------------------------------------------------------------------------------------------------

---A dense linear layer, `x weight + bias`.
---@class qm.nn.Linear : qm.Module
---@field weight qm.Tensor   [inputs, outputs]
---@field bias qm.Tensor|nil [outputs]
local Linear = module.class("Linear")
M.Linear = Linear

---@param inputs integer
---@param outputs integer
---@param options table|nil  { bias = false, std = 0.7 / sqrt(inputs), dtype = "f32" (or "bf16", then
---   steps round stochastically), device = default, generator = the default one }
function Linear.new(inputs, outputs, options)
  local name = "qm.nn.Linear"
  check.integer(name, "inputs", inputs, 1)
  check.integer(name, "outputs", outputs, 1)
  options = check.options(name, options, { bias = false, std = default_std(inputs), dtype = "f32",
    device = check.optional, generator = check.optional })
  local self = module.create(Linear)
  module.parameter(self, "weight", { inputs, outputs }, function()
    return draw(name, { inputs, outputs }, options.std, options):requires_gradient()
  end, { dtype = options.dtype })
  if options.bias then bias_of(self, outputs, options) end
  return self
end

---@param x qm.Tensor  float [R, inputs]
---@return qm.Tensor   x's type, [R, outputs]
function Linear:forward(x) return qm.linear(x, self.weight, self.bias) end

function Linear:summary()
  local shape = self.weight.shape
  return ("%d -> %d, %s%s"):format(shape[1], shape[2], self.weight.dtype, self.bias and ", bias" or "")
end

---------------------------------------------------------------------------------------------------

---A linear layer whose weight exists in quantized form only.
---@class qm.nn.QLinear : qm.Module
---@field weight qm.QParam   K x N
---@field bias qm.Tensor|nil [outputs]
local QLinear = module.class("QLinear")
M.QLinear = QLinear

---How much wider than its fresh weights a grid is. A fixed grid clips what grows beyond its ends; a
---wider one has coarser steps. Measured on text (4 bits in groups of 64, momentum feedback, 600 steps,
---two seeds, nats per character): 1.25 costs 0.022, 1.5 costs 0.010 (one seed), though with 1 the share
---of codes at the ends grows from 4 to 9 %. A spread of 0.5 / sqrt(inputs) costs 0.025: its grid is
---too narrow for the weights to grow.
local GRID_RANGE = 1

local QUANTIZE_DEFAULTS = { w_bit = 4, group_size = 64, asym = true, scale_dtype = "f16", method = "minmax",
  range = GRID_RANGE, grad_dtype = "f32" }

---The options of QParam.quantize among ours.
local function quantize_options(options)
  return { w_bit = options.w_bit, group_size = options.group_size, asym = options.asym,
    dtype = options.scale_dtype, method = options.method, range = options.range, grad_dtype = options.grad_dtype }
end

---A fresh layer: random weights are drawn, quantized at once and released.
---@param inputs integer   a multiple of 32 and of group_size
---@param outputs integer
---@param options table|nil  { w_bit = 4, group_size = 64, asym = true, scale_dtype = "f16",
---   method = "minmax" or "mse", range = 1 (times the span of the fresh weights, for a fixed grid must
---   leave room to grow), grad_dtype = "f32" or "bf16" (half the memory, every sum rounded),
---   std = 0.7 / sqrt(inputs), bias = false, device = default, generator }
function QLinear.new(inputs, outputs, options)
  local name = "qm.nn.QLinear"
  check.integer(name, "inputs", inputs, 1)
  check.integer(name, "outputs", outputs, 1)
  local defaults = { std = default_std(inputs), bias = false, device = check.optional, generator = check.optional }
  for key, value in pairs(QUANTIZE_DEFAULTS) do defaults[key] = value end
  options = check.options(name, options, defaults)
  if module.is_declaring() then
    local self = module.create(QLinear)
    module.parameter(self, "weight", { inputs, outputs }, nil, { quantize = quantize_options(options) })
    if options.bias then bias_of(self, outputs, options) end
    return self
  end
  local dense = draw(name, { inputs, outputs }, options.std, { device = options.device,
    generator = options.generator })
  local weight = qm.QParam.quantize(dense, quantize_options(options))
  dense:free()
  return QLinear.from(weight, options.bias and new_bias(outputs, options) or nil)
end

---A layer around an existing quantized weight, which it owns from now on.
---@param weight qm.QParam
---@param bias qm.Tensor|nil [N]
function QLinear.from(weight, bias)
  local self = module.create(QLinear)
  if not module.is_quantized(weight) then check.fail("qm.nn.QLinear.from", "weight", "a QParam", weight) end
  if weight.requires_grad == nil then weight.requires_grad = true end
  self:register("weight", weight)
  if bias then self:register("bias", bias) end
  return self
end

---@param x qm.Tensor  float [R, inputs]
---@return qm.Tensor   x's type, [R, outputs]
function QLinear:forward(x) return qm.qlinear(x, self.weight, self.bias) end

function QLinear:summary()
  local q = self.weight
  return ("%d -> %d, %s%s"):format(q.shape[1], q.shape[2], q:layout(), self.bias and ", bias" or "")
end

---Several linear layers over the same rows; quantized ones in one call where that is possible.
---@param x qm.Tensor  float [R, inputs]
---@param ... qm.Module
---@return qm.Tensor ...  one for each layer
function M.together(x, ...)
  local modules, weights, biases, outs = { ... }, {}, {}, {}
  for i = 1, #modules do
    local layer = modules[i]
    if not module.is_module(layer) then check.fail("qm.nn.together", "layer " .. i, "a module", layer) end
    if getmetatable(layer) ~= QLinear then
      for j = 1, #modules do outs[j] = modules[j](x) end
      return unpack(outs)
    end
    weights[i], biases[i] = layer.weight, layer.bias
  end
  return qm.qlinear_group(x, weights, biases)
end

---@param kind string "mpq" (quantized) or "dense"
---@param options table|nil  the rest of QLinear's or Linear's options
---@return function  (inputs, outputs, { bias =, device =, generator = }) -> a layer
function M.linear_factory(kind, options)
  local class = check.one_of("qm.nn.linear_factory", "kind", kind, { "mpq", "dense" }) == "mpq" and QLinear or Linear
  return function(inputs, outputs, more)
    local merged = {}
    for key, value in pairs(options or {}) do merged[key] = value end
    for key, value in pairs(more or {}) do merged[key] = value end
    return class.new(inputs, outputs, merged)
  end
end

---------------------------------------------------------------------------------------------------

---A table of vectors, one for each token.
---@class qm.nn.Embedding : qm.Module
---@field weight qm.Tensor [count, size]
local Embedding = module.class("Embedding")
M.Embedding = Embedding

---@param count integer  of tokens
---@param size integer   of a vector
---@param options table|nil  { std = 0.02, dtype = "f32", activations = the weight's type, padding = nil (the
---   token whose vector gets no gradient), device, generator }
function Embedding.new(count, size, options)
  local name = "qm.nn.Embedding"
  check.integer(name, "count", count, 1)
  check.integer(name, "size", size, 1)
  options = check.options(name, options, { std = 0.02, dtype = "f32", activations = check.optional,
    padding = check.optional, device = check.optional, generator = check.optional })
  local self = module.create(Embedding)
  self.activations = options.activations
  self.padding = options.padding
  module.parameter(self, "weight", { count, size }, function()
    return draw(name, { count, size }, options.std, options):requires_gradient()
  end, { dtype = options.dtype })
  return self
end

---@param index qm.Tensor  i32 [R], from 0
---@return qm.Tensor       [R, size], of the type `activations`
function Embedding:forward(index)
  return qm.embedding(self.weight, index, { dtype = self.activations, padding = self.padding })
end

function Embedding:summary()
  local shape = self.weight.shape
  return ("%d x %d, %s"):format(shape[1], shape[2], self.weight.dtype)
end

---------------------------------------------------------------------------------------------------

local function ones_of(self, size, options)
  module.parameter(self, "weight", { size }, function()
    return tensors.ones({ size }, { device = options.device, requires_grad = true })
  end)
end

---Root mean square normalisation of rows. Source: arXiv 1910.07467.
---@class qm.nn.RMSNorm : qm.Module
---@field weight qm.Tensor f32 [size]
local RMSNorm = module.class("RMSNorm")
M.RMSNorm = RMSNorm

---@param size integer
---@param options table|nil  { eps = 1e-6, device = default }
function RMSNorm.new(size, options)
  local name = "qm.nn.RMSNorm"
  check.integer(name, "size", size, 1)
  options = check.options(name, options, { eps = 1e-6, device = check.optional })
  local self = module.create(RMSNorm)
  self.eps = check.number(name, "eps", options.eps, 0)
  ones_of(self, size, options)
  return self
end

---`rms_norm(x)`, or with a residual `rms_norm(x + residual), x + residual`.
---@param x qm.Tensor  float [R, size]
---@param residual qm.Tensor|nil  the same
---@return qm.Tensor normed, qm.Tensor sum  the sum is x itself without a residual
function RMSNorm:forward(x, residual)
  if residual then return qm.add_rms_norm(x, residual, self.weight, self.eps) end
  return qm.rms_norm(x, self.weight, self.eps), x
end

function RMSNorm:summary() return ("%d, eps %g"):format(self.weight.shape[1], self.eps) end

---------------------------------------------------------------------------------------------------

---Layer normalisation of rows. Source: arXiv 1607.06450.
---@class qm.nn.LayerNorm : qm.Module
---@field weight qm.Tensor   f32 [size]
---@field bias qm.Tensor|nil f32 [size]
local LayerNorm = module.class("LayerNorm")
M.LayerNorm = LayerNorm

---@param size integer
---@param options table|nil  { eps = 1e-5, bias = true, device = default }
function LayerNorm.new(size, options)
  local name = "qm.nn.LayerNorm"
  check.integer(name, "size", size, 1)
  options = check.options(name, options, { eps = 1e-5, bias = true, device = check.optional })
  local self = module.create(LayerNorm)
  self.eps = check.number(name, "eps", options.eps, 0)
  ones_of(self, size, options)
  if check.type(name, "bias", options.bias, "boolean") then bias_of(self, size, options) end
  return self
end

---`layer_norm(x)`, or with a residual `layer_norm(x + residual), x + residual`.
---@param x qm.Tensor  float [R, size]
---@param residual qm.Tensor|nil  the same
---@return qm.Tensor normed, qm.Tensor sum  the sum is x itself without a residual
function LayerNorm:forward(x, residual)
  if residual then return qm.add_layer_norm(x, residual, self.weight, self.bias, self.eps) end
  return qm.layer_norm(x, self.weight, self.bias, self.eps), x
end

function LayerNorm:summary()
  return ("%d, eps %g%s"):format(self.weight.shape[1], self.eps, self.bias and "" or ", no bias")
end

return M
