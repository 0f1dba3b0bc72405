---Rotations for contexts longer than the model was pretrained on.
---
---Source: transformers' modeling_rope_utils, types "linear" and "llama3".

local M = {}

---A pair's frequency, stretched: "linear" divides all by factor; "llama3" those whose wavelength is long against
---the original context, the short ones not at all, and goes over smoothly between.
---@param scaling table  as qm.rope_tables has it
function M.stretch(frequency, scaling)
  if scaling.rope_type == "linear" then return frequency / scaling.factor end
  local turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
  local low, high = scaling.low_freq_factor, scaling.high_freq_factor
  local kept = math.min(math.max((turns - low) / (high - low), 0), 1)
  return (1 - kept) * frequency / scaling.factor + kept * frequency
end

return M
