---A tensor in another element type, for products whose weights are f32 and whose activations are not.
---The copy of a parameter stays with it and is made anew only after the parameter changed: the engine
---counts what writes to a storage, so no writer has to know of the copy.

local binding = require("quartermoon.ffi")
local lib = binding.lib

local M = {}

---@param tensor qm.Tensor
---@param dtype string
---@return qm.Tensor cast       the tensor itself where the type is right; not to be changed
---@return boolean is_temporary  the caller's to free
local function cast_to(tensor, dtype)
  if tensor.dtype == dtype then return tensor, false end
  if not tensor.requires_grad or tensor.node then return tensor:to(dtype), true end
  tensor.casts = tensor.casts or {}
  local kept = tensor.casts[dtype]
  if not kept then
    kept = { tensor = tensor:empty_like(dtype):keep() }
    tensor.casts[dtype] = kept
  end
  local version = tonumber(lib.qm_storage_version(tensor.storage))
  if kept.version ~= version then
    kept.version = nil
    binding.check(lib.qm_copy(tensor.desc, kept.tensor.desc), "cast")
    kept.version = version
  end
  return kept.tensor, false
end

---Run `body` on the tensor in that type.
---@param tensor qm.Tensor
---@param dtype string
---@param body function  cast -> result
---@return any result
function M.with(tensor, dtype, body)
  local cast, is_temporary = cast_to(tensor, dtype)
  local result = body(cast)
  if is_temporary then cast:free() end
  return result
end

---Release the copies of a tensor that is released.
---@param tensor qm.Tensor
function M.free(tensor)
  for _, kept in pairs(tensor.casts) do kept.tensor:free() end
  tensor.casts = nil
end

return M
