---Gradients. Every operation that ran on something differentiable leaves a node on its output;
---`loss:backward()` walks the nodes once, latest first, and releases each activation as soon as its
---node is done. An operation stands in one place (ops/*.lua): its kernel call, then `record` with the
---gradient beside it.

local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local scopes = require("quartermoon.scope")
local tensors = require("quartermoon.tensor")
local Tensor = tensors.Tensor
local lib = binding.lib

local M = {}

local enabled = true
local sequence = 0
local ones = setmetatable({}, { __mode = "k" }) -- gradients that are known to be 1

---Does anything here lead back to a parameter?
local function needs_grad(tensor) return tensor and (tensor.requires_grad or tensor.node) and true or false end
M.needs_grad = needs_grad

---Is gradient recording on?
function M.enabled() return enabled end

local function finish(before, ok, ...)
  enabled = before
  if not ok then error((...), 0) end
  return ...
end

---Run `body` without recording: evaluation, generation, updates.
function M.no_grad(body, ...)
  local before = enabled
  enabled = false
  return finish(before, pcall(body, ...))
end

---Run `body` with recording on (inside a no_grad, as checkpointing needs).
function M.with_grad(body, ...)
  local before = enabled
  enabled = true
  return finish(before, pcall(body, ...))
end

---Note how `outputs` came about.
---@param name string
---@param inputs (qm.Tensor|false)[]  what the gradient may flow to; false for an absent one
---@param outputs qm.Tensor[]
---@param saved qm.Tensor[]           extra tensors that only backward needs; released after it, or now
---@param backward function           (dout, ...) -> one gradient (or nil) for each input. It owns
---   nothing: the caller releases the douts. The gradients it returns are new tensors (or :share()s).
---@return qm.Tensor ...              the outputs
function M.record(name, inputs, outputs, saved, backward)
  local wanted = false
  if enabled then
    for i = 1, #inputs do wanted = wanted or needs_grad(inputs[i]) end
  end
  if wanted then
    sequence = sequence + 1
    local node = { id = sequence, name = name, inputs = inputs, outputs = outputs, saved = saved, backward = backward }
    for i = 1, #outputs do outputs[i].node = node end
  else
    for i = 1, #saved do saved[i]:free() end
  end
  return unpack(outputs)
end

---Add `grad` (owned by the caller no longer) to what has gathered so far.
local function add(gathered, grad)
  if not gathered then return grad end
  ones[gathered] = nil
  -- Memory that somebody else holds too must not change under them.
  if gathered:references() > 1 then
    local own = gathered:clone()
    gathered:free()
    gathered = own
  end
  binding.check(lib.qm_accumulate(grad.desc, gathered.desc, 1, 1), "backward")
  grad:free()
  return gathered
end

---Accumulate into a leaf's `.grad`, an f32 tensor of its own. Takes over `grad`.
local function add_to_leaf(leaf, grad)
  if leaf.grad then
    binding.check(lib.qm_accumulate(grad.desc, leaf.grad.desc, 1, 1), "backward")
  elseif grad.dtype == "f32" and grad:references() == 1 then
    leaf.grad = grad:keep()
    return
  else
    leaf.grad = grad:to("f32"):keep()
  end
  grad:free()
end

local unwritten = {} -- leaves whose new gradient buffer the node under way has yet to write

---The f32 gradient buffer of a leaf, and whether it already holds something (beta for a product
---that accumulates straight into it).
---@return qm.Tensor buffer, number beta
function M.leaf_grad(leaf)
  if leaf.grad then return leaf.grad, 1 end
  leaf.grad = leaf:empty_like("f32"):keep()
  unwritten[leaf] = true
  return leaf.grad, 0
end

---Every node that the roots depend on, latest first.
local function collect_nodes(roots)
  local nodes, seen, stack = {}, {}, {}
  for i = 1, #roots do stack[i] = roots[i].node end
  while #stack > 0 do
    local node = table.remove(stack)
    if not seen[node] then
      seen[node] = true
      nodes[#nodes + 1] = node
      for _, input in ipairs(node.inputs) do
        if input and input.node then stack[#stack + 1] = input.node end
      end
    end
  end
  table.sort(nodes, function(a, b) return a.id > b.id end)
  return nodes
end

---Hand one node's gradients on to its inputs.
local function pass_on(node, grads, ...)
  for i = 1, #node.inputs do
    local grad, input = (select(i, ...)), node.inputs[i]
    if grad then
      if input and input.node then
        grads[input] = add(grads[input], grad)
      elseif input and input.requires_grad then
        add_to_leaf(input, grad)
      else
        grad:free()
      end
    end
  end
end

---Release an operation's output now and run `body(...)` again when backward() comes to who used it: for what is
---cheap beside its memory and comes from tensors that stay anyway.
---@param tensor qm.Tensor  nothing forward reads it any more
---@param body function     its operation, which gives the same again
function M.forget(tensor, body, ...)
  if not (enabled and tensor.node) then return end
  tensor.again = { body, ... }
  tensor:free()
end

local function remember(tensor)
  local again = tensor.again
  tensor.again = nil
  tensors.revive(tensor, again[1](unpack(again, 2)))
end

---Run one node's gradient and release what it kept. `roots` are spared.
local function run_node(node, grads, roots)
  local douts, any = {}, false
  for i, output in ipairs(node.outputs) do
    douts[i] = grads[output]
    grads[output] = nil
    any = any or douts[i] ~= nil
  end
  if any then
    for _, input in ipairs(node.inputs) do
      if input and input.again then remember(input) end
    end
    pass_on(node, grads, node.backward(unpack(douts, 1, #node.outputs)))
    if next(unwritten) then unwritten = {} end
  end
  for i, output in ipairs(node.outputs) do
    if douts[i] then douts[i]:free() end
    output.node = nil
    if not roots[output] and not output.kept then output:free() end
  end
  for i = 1, #node.saved do node.saved[i]:free() end
  node.backward, node.inputs, node.saved = nil, nil, nil
end

---How many of these nodes use each leaf that wants to know when its gradient is complete.
local function count_uses(nodes)
  local uses = {}
  for _, node in ipairs(nodes) do
    for _, input in ipairs(node.inputs) do
      if input and input.on_gradient then uses[input] = (uses[input] or 0) + 1 end
    end
  end
  return uses
end

local running -- the gradients that the running backward() has gathered, by tensor

---What has gathered so far of an input's gradient, if it may change in place: an operation may then add
---to it (a product with beta 1) and return nil for that input, sparing a tensor and a pass over it.
---@param input qm.Tensor
---@return qm.Tensor|nil  of the input's type and shape
function M.gathered(input)
  local sum = running and running[input]
  if sum and sum.dtype == input.dtype and sum:references() == 1 then
    ones[sum] = nil
    return sum
  end
end

---Is this gradient known to be 1, as that of a loss is? What was scaled for it in the forward pass is
---done; asking the tensor would wait for the device.
function M.is_one(grad) return ones[grad] or false end

local function walk(roots, grads, is_root)
  local nodes = collect_nodes(roots)
  local uses = count_uses(nodes)
  for _, node in ipairs(nodes) do
    local inputs = node.inputs
    run_node(node, grads, is_root)
    for _, input in ipairs(inputs) do
      if input and uses[input] then
        uses[input] = uses[input] - 1
        if uses[input] == 0 then input.on_gradient(input) end
      end
    end
  end
end

---Gradients from several tensors at once; see Tensor:backward. Takes over the gradients. A leaf with a
---function `on_gradient` has it called, `leaf.on_gradient(leaf)`, as soon as its gradient is complete. After
---an error some leaves have their gradients and some do not: drop them all.
---@param roots qm.Tensor[]
---@param root_grads qm.Tensor[]  one for each root
function M.backward(roots, root_grads)
  local grads, is_root, outer = {}, {}, running
  for i, root in ipairs(roots) do
    grads[root] = grads[root] and add(grads[root], root_grads[i]) or root_grads[i]
    is_root[root] = true
  end
  running = grads
  local ok, message = pcall(scopes.guard, M.no_grad, walk, roots, grads, is_root)
  running = outer
  if ok then return end
  for _, grad in ipairs(root_grads) do grad:free() end
  for leaf in pairs(unwritten) do leaf:zero_grad() end
  unwritten = {}
  error(message, 0)
end

---Gradients of this tensor with respect to every leaf it depends on, added to the leaves' `.grad`.
---Releases what the forward pass kept: every intermediate tensor but this one and those `:keep()`ed.
---@param grad qm.Tensor|nil  the gradient to start from, of this tensor's shape; default 1, for a tensor
---   of one element
function Tensor:backward(grad)
  check.desc("backward", "self", self)
  self:alive("backward")
  if not self.node then
    binding.raise("backward: this tensor depends on nothing that requires a gradient (or backward() ran already)")
  end
  if grad == nil then
    if self:count() ~= 1 then check.fail("backward", "grad", "a gradient, for this is no single number", grad) end
    grad = self:empty_like():fill(1)
    ones[grad] = true
  else
    check.desc("backward", "grad", grad)
    if table.concat(grad.shape, ",") ~= table.concat(self.shape, ",") then
      check.fail("backward", "grad", ("a gradient of shape [%s]"):format(table.concat(self.shape, ", ")), grad)
    end
    grad = grad:share()
  end
  M.backward({ self }, { grad })
end

---Recompute instead of store: run `body(...)` without keeping its activations and run it again when
---backward() needs them.
---@param body function  tensors (and other values) -> tensors; must depend on its arguments and
---   parameters only, and give the same results twice
---@return qm.Tensor ...
function M.checkpoint(body, ...)
  check.type("qm.checkpoint", "body", body, "function")
  if not enabled then return body(...) end
  local arguments, count = { ... }, select("#", ...)
  local inputs = {}
  for i = 1, count do inputs[i] = check.is_tensor(arguments[i]) and arguments[i] or false end
  local outputs = { tensors.scope(function() return M.no_grad(body, unpack(arguments, 1, count)) end) }
  local handed = {}
  for i = 1, count do if inputs[i] then handed[inputs[i]] = true end end
  for i = 1, #outputs do
    if not check.is_tensor(outputs[i]) then
      check.fail("qm.checkpoint", "body", "a function that returns tensors", outputs[i])
    end
    -- What body merely hands through keeps its own place on the tape.
    if handed[outputs[i]] or needs_grad(outputs[i]) then outputs[i] = outputs[i]:share() end
  end
  local function backward(...)
    local leaves = {}
    for i = 1, count do
      leaves[i] = arguments[i]
      if inputs[i] then
        leaves[i] = inputs[i]:share()
        leaves[i].requires_grad = needs_grad(inputs[i])
      end
    end
    local results = { M.with_grad(body, unpack(leaves, 1, count)) }
    local roots, root_grads = {}, {}
    for i, result in ipairs(results) do
      local dout = (select(i, ...))
      if dout and result.node then
        roots[#roots + 1], root_grads[#roots + 1] = result, dout:share()
      elseif dout and result.requires_grad then
        add_to_leaf(result, dout:share())
      end
    end
    M.backward(roots, root_grads)
    local grads = {}
    for i = 1, count do
      if inputs[i] then
        local grad = leaves[i].grad
        if grad and grad.dtype ~= inputs[i].dtype then
          grads[i] = grad:to(inputs[i].dtype)
          grad:free()
        else
          grads[i] = grad
        end
        leaves[i]:free()
      end
    end
    for _, result in ipairs(results) do
      if not result.kept then result:free() end
    end
    return unpack(grads, 1, count)
  end
  sequence = sequence + 1
  local node = { id = sequence, name = "checkpoint", inputs = inputs, outputs = outputs, saved = {},
    backward = backward }
  for i = 1, #outputs do outputs[i].node = node end
  return unpack(outputs)
end

return M
