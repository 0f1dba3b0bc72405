---The transformer's layers: forward (one kernel call) next to backward.

local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local record = require("quartermoon.autograd").record
local lib = binding.lib

local M = {}

---SwiGLU: `silu(gate) * up`.
---
---Source: Shazeer, arXiv 2002.05202.
---
---@param gate qm.Tensor  float [...]
---@param up qm.Tensor    gate's type and shape
---@return qm.Tensor      the same type and shape
---@raise when types, shapes or devices differ
function M.swiglu(gate, up)
  local name = "qm.swiglu"
  local gate_desc, up_desc = check.desc(name, "gate", gate), check.desc(name, "up", up)
  local out = gate:empty_like()
  binding.check(lib.qm_swiglu(gate_desc, up_desc, out.desc), name)
  return record("swiglu", { gate, up }, { out }, {}, function(dout)
    local dgate, dup = gate:empty_like(), up:empty_like()
    binding.check(lib.qm_swiglu_backward(dout.desc, gate.desc, up.desc, dgate.desc, dup.desc), name)
    return dgate, dup
  end)
end

return M
