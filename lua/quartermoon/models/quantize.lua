---Quantizing a trained model: block by block, each linear layer against the inputs that reach it through
---the layers quantized before it.
---
---    local model = qm.models.load("Llama-3.2-1B", { linear = { kind = "dense" } })
---    local report = qm.models.quantize(model, { w_bit = 4, group_size = 128 }, batches)
---    for _, layer in ipairs(report) do print(layer.name, layer.output) end
---
---Source: GPTQ, arXiv 2210.17323, section 4; layers that share their input (queries, keys and values)
---share a Hessian, and those behind them see what they have become.

local autograd = require("quartermoon.autograd")
local check = require("quartermoon.check")
local gptq = require("quartermoon.gptq")
local module = require("quartermoon.nn.module")
local nn = require("quartermoon.nn")
local qm = require("quartermoon")
local raise = require("quartermoon.ffi").raise

local M = {}

---The list of blocks in a model's tree, and its path.
local function blocks_of(parent, prefix)
  for _, name in ipairs(parent.members) do
    local child = parent[name]
    if getmetatable(child) == module.List and #child > 0 then return child, prefix .. name end
    if module.is_module(child) then
      local found, path = blocks_of(child, prefix .. name .. ".")
      if found then return found, path end
    end
  end
end

---The dense linear layers below `parent`: { parent =, key =, layer =, name = }.
local function linears_of(parent, prefix, list)
  for _, key in ipairs(parent.members) do
    local child = parent[key]
    if getmetatable(child) == nn.Linear then
      list[#list + 1] = { parent = parent, key = key, layer = child, name = prefix .. key }
    elseif module.is_module(child) then
      linears_of(child, prefix .. key .. ".", list)
    end
  end
  return list
end

local STOP = {}

---Run `body` until it raises STOP; what else it raises goes on.
local function until_stop(body, ...)
  local ok, message = pcall(qm.scope, body, ...)
  if not ok and message ~= STOP then error(message, 0) end
end

---What goes into the first block, for every batch: { x =, residual =, context = }.
local function first_inputs(name, model, blocks, batches)
  local states = {}
  local first = blocks[1]
  first.forward = function(_, x, residual, context)
    states[#states + 1] = { x = x:clone():keep(), residual = residual and residual:clone():keep(), context = context }
    error(STOP, 0)
  end
  local ok, message = pcall(function()
    for i, batch in ipairs(batches) do
      check.type(name, ("batches[%d]"):format(i), batch, "table")
      until_stop(model.logits, model, batch[1], batch[2])
    end
  end)
  first.forward = nil
  if not ok then error(message, 0) end
  return states
end

---The layers that see the same tensor, in the order in which they see it: lists of linears.
local function by_input(block, linears, state)
  local groups, of = {}, {}
  for _, entry in ipairs(linears) do
    local forward = entry.layer.forward
    entry.layer.forward = function(layer, x)
      if not of[x] then
        of[x] = {}
        groups[#groups + 1] = of[x]
      end
      table.insert(of[x], entry)
      return forward(layer, x)
    end
  end
  local ok, message = pcall(qm.scope, function() block(state.x, state.residual, state.context) end)
  for _, entry in ipairs(linears) do entry.layer.forward = nil end
  if not ok then error(message, 0) end
  return groups
end

---What the layers of a group see, over all batches.
local function hessian_of(block, group, states)
  local layer = group[1].layer
  local hessian = gptq.hessian(layer.weight.shape[1], { device = layer.weight.device })
  layer.forward = function(_, x)
    hessian:add(x)
    error(STOP, 0)
  end
  local ok, message = pcall(function()
    for _, state in ipairs(states) do until_stop(block.forward, block, state.x, state.residual, state.context) end
  end)
  layer.forward = nil
  if ok then return hessian end
  hessian:free()
  error(message, 0)
end

---Put a quantized layer into a dense one's place.
local function replace(entry, hessian, options, report, on_layer)
  local dense = entry.layer
  local own = {}
  for key, value in pairs(options) do own[key] = value end
  own.method, own.name = nil, entry.name
  local ok, q, line = pcall(gptq.quantize, dense.weight, options.method == "gptq" and hessian or nil, own)
  if not ok then raise(("qm.models.quantize: %s: %s"):format(entry.name, tostring(q))) end
  if hessian and not line.output then line.output = gptq.error_of(dense.weight, q, hessian).output end
  line.name, line.shape = entry.name, dense.weight.shape
  entry.parent:register(entry.key, nn.QLinear.from(q, dense.bias))
  dense.weight:zero_grad()
  dense.weight:free()
  report[#report + 1] = line
  if on_layer then on_layer(line) end
end

---Take every batch through a block.
local function advance(block, states)
  for _, state in ipairs(states) do
    local x, residual = qm.scope(block.forward, block, state.x, state.residual, state.context)
    state.x:free()
    if state.residual and state.residual ~= residual then state.residual:free() end
    state.x, state.residual = x:keep(), residual and residual:keep()
  end
end

local function quantize_block(block, prefix, states, o, report)
  local linears = linears_of(block, prefix, {})
  local groups = #states > 0 and #linears > 0 and by_input(block, linears, states[1]) or { linears }
  for _, group in ipairs(groups) do
    local hessian = #states > 0 and #group > 0 and hessian_of(block, group, states) or nil
    local ok, message = pcall(function()
      for _, entry in ipairs(group) do replace(entry, hessian, o.layer, report, o.on_layer) end
    end)
    if hessian then hessian:free() end
    if not ok then error(message, 0) end
  end
  advance(block, states)
end

local OPTIONS = { method = "gptq", on_layer = check.optional, w_bit = 4, group_size = 128, grid = "asym",
  act_order = false, static_groups = false, damping = 0.01, fit = "minmax", dtype = "f16", zero_offset = 1 }

---Quantize the dense linear layers of a model's blocks, in place. Embedding, head and norms stay.
---@param model qm.models.Decoder
---@param options table|nil  { method = "gptq" or "rtn" (round to nearest), on_layer = function(line),
---   w_bit = 4, group_size = 128 ...: see qm.gptq.quantize }
---@param batches table|nil  what calibrates: a list of { tokens i32 [R], cu_seqlens or nil }. "rtn" needs none
---@return table report  a line for each layer: { name =, shape =, weight =, output =, damping = }
---@raise when an option does not fit, or a layer cannot be quantized, naming it
function M.quantize(model, options, batches)
  local name = "qm.models.quantize"
  if not module.is_module(model) then check.fail(name, "model", "a model", model) end
  local o = check.options(name, options, OPTIONS)
  check.one_of(name, "method", o.method, { "gptq", "rtn" })
  batches = check.type(name, "batches", batches or {}, "table")
  if o.method == "gptq" and #batches == 0 then check.fail(name, "batches", "what calibrates, for 'gptq'", batches) end
  local blocks, path = blocks_of(model, "")
  if not blocks then check.fail(name, "model", "a model with blocks", model) end
  local layer = {}
  for key, value in pairs(o) do if key ~= "on_layer" then layer[key] = value end end
  local report = {}
  autograd.no_grad(function()
    local states = first_inputs(name, model, blocks, batches)
    local ok, message = pcall(function()
      for i, block in ipairs(blocks) do
        quantize_block(block, ("%s.%d."):format(path, i - 1), states, { layer = layer, on_layer = o.on_layer }, report)
      end
    end)
    for _, state in ipairs(states) do
      state.x:free()
      if state.residual then state.residual:free() end
    end
    if not ok then error(message, 0) end
  end)
  return report
end

---Perplexity, exp of the mean cross entropy, and that mean in nats.
---@param model qm.models.Decoder
---@param batches function  an iterator: tokens, targets, cu_seqlens, as data:held_out gives them
---@return number perplexity, number nats
function M.perplexity(model, batches)
  if not module.is_module(model) or not model.loss then
    check.fail("qm.models.perplexity", "model", "a language model", model)
  end
  check.type("qm.models.perplexity", "batches", batches, "function")
  local sum, count = 0, 0
  autograd.no_grad(function()
    for tokens, targets, cu_seqlens in batches do
      qm.scope(function() sum = sum + model:loss(tokens, targets, cu_seqlens):item() * targets.shape[1] end)
      count = count + targets.shape[1]
    end
  end)
  if count == 0 then check.fail("qm.models.perplexity", "batches", "at least one", count) end
  return math.exp(sum / count), sum / count
end

return M
