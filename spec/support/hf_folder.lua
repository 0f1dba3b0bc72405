-- A model folder with what transformers computed from it: reference.safetensors holds input_ids, labels,
-- logits, loss and the gradient of every parameter; meta.json says how.
local qm = require("quartermoon")
local process = require("spec.support.process")
local testing = require("spec.support.testing")

local M = {}

---Rows of all sequences one after the other. Their labels are shifted inside the model, ours are not.
local function batch_of(file)
  local input, labels = file:tensor("input_ids"):totable(), file:tensor("labels"):totable()
  local tokens, targets, offsets = {}, {}, { 0 }
  for s, sequence in ipairs(input) do
    for i, token in ipairs(sequence) do
      tokens[#tokens + 1] = token
      targets[#targets + 1] = labels[s][i + 1] or -100
    end
    offsets[s + 1] = #tokens
  end
  local options = { dtype = "i32", device = testing.device }
  return qm.tensor(tokens, options), qm.tensor(targets, options), offsets
end
M.batch_of = batch_of

---Logits, loss and gradients of a folder's model are those recorded, within `tolerance` of the largest.
---@param folder string
---@param recorded string|nil  where reference.safetensors lies, default the folder
---@param tolerance number|nil  default 1e-4
function M.replay(folder, recorded, tolerance)
  tolerance = tolerance or 1e-4
  local model = qm.models.load(folder, { dtype = "f32", device = testing.device })
  qm.safetensors.with((recorded or folder) .. "/reference.safetensors", function(file)
    local tokens, targets, offsets = batch_of(file)
    local logits = qm.no_grad(model.logits, model, tokens, offsets)
    testing.assert_close(file:tensor("logits"):reshape(logits.shape), logits, tolerance, "logits")
    local loss = model:loss(tokens, targets, offsets)
    local expected = file:tensor("loss"):item()
    assert(math.abs(expected - loss:item()) <= tolerance * math.abs(expected), "the loss differs")
    loss:backward()
    local seen = 0
    for _, entry in ipairs(model:published_parameters()) do
      local key = "grad." .. entry.name
      if file:has(key) then
        seen = seen + 1
        assert(entry.param.grad, entry.name .. " has no gradient")
        local grad = entry.transposed and entry.param.grad:transpose() or entry.param.grad
        testing.assert_close(file:tensor(key), grad, tolerance, entry.name)
      end
    end
    local wanted = 0
    for _, key in ipairs(file:names()) do if key:find("^grad%.") then wanted = wanted + 1 end end
    assert(seen == wanted, ("%d recorded gradients, %d of them looked at"):format(wanted, seen))
  end)
  model:free()
end

---The folder with its configuration of the older generation.
function M.replay_legacy(folder)
  local twin, remove = process.folder()
  local from = process.run("realpath " .. process.quote(folder)):match("[^\n]+")
  os.execute(("ln -s %s/*.safetensors %s/"):format(process.quote(from), twin))
  process.write(twin .. "/config.json", process.read(folder .. "/config.legacy.json"))
  local ok, message = pcall(M.replay, twin)
  remove()
  if not ok then error(message, 0) end
end

return M
