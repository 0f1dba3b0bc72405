---Quartermoon: training neural networks whose weights exist only in quantized form.
---
---    local qm = require("quartermoon")
---    local x = qm.randn({ 2, 3 })
---
---Tensors, their operations and gradients are here at once; everything else (qm.nn, qm.optim,
---qm.data ...) loads when first named.

local qm = { VERSION = "0.1.0" }

local tensors = require("quartermoon.tensor")
local devices = require("quartermoon.device")
local autograd = require("quartermoon.autograd")
local random = require("quartermoon.random")

qm.Tensor = tensors.Tensor
for _, name in ipairs({ "tensor", "empty", "zeros", "ones", "full", "arange", "from_string", "map_file", "scope" }) do
  qm[name] = tensors[name]
end
qm.device, qm.set_default_device, qm.default_device = devices.open, devices.set_default, devices.default
qm.no_grad, qm.checkpoint = autograd.no_grad, autograd.checkpoint
qm.seed, qm.rand, qm.randn, qm.generator = random.seed, random.rand, random.randn, random.generator

---How many devices, storages and files this process holds open.
function qm.handles_live() return tonumber(require("quartermoon.ffi").lib.qm_handles_live()) end

-- The operations: every public function of these modules is a function of qm.
for _, name in ipairs({
  "adam",
  "attention",
  "elementwise",
  "index",
  "layers",
  "linalg",
  "mlp",
  "reduce",
  "shape",
  "unary",
  "loss",
  "norms",
  "qlinear",
}) do
  for key, value in pairs(require("quartermoon.ops." .. name)) do qm[key] = value end
end

-- Modules that load when first named: qm.nn is require("quartermoon.nn").
local MODULES = { clock = true, options = true, progress = true, metrics = true, nn = true, models = true, optim = true,
  schedule = true, projector = true, data = true, tokenizer = true, chat = true, checkpoints = true, safetensors = true,
  plot = true, files = true, gptq = true, ceilings = true, repl = true, cli = true, inspection = true, gguf = true }

return setmetatable(qm, { __modules = MODULES, __index = function(_, key)
  if MODULES[key] then
    local module = require("quartermoon." .. key)
    rawset(qm, key, module)
    return module
  elseif key == "profile" then
    rawset(qm, key, require("quartermoon.profile").profile)
    return qm.profile
  elseif key == "graph" then
    rawset(qm, key, require("quartermoon.graph").graph)
    return qm.graph
  elseif key == "QParam" then
    rawset(qm, key, require("quartermoon.qparam").QParam)
    return qm.QParam
  end
end })
