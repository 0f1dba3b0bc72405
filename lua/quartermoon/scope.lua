---Scopes: tensors made inside are released at the end. Lua's collector does not see device memory, so
---nothing may depend on it.

local check = require("quartermoon.check")

local M = {}

local scope -- the innermost open scope: a list of the tensors made in it

---A tensor was made.
function M.note(tensor)
  if scope then scope[#scope + 1] = tensor end
end

local function spare(value, spared)
  if type(value) ~= "table" then return end
  if rawget(value, "desc") then
    spared[value] = true
  elseif not spared[value] then
    spared[value] = true
    for _, item in pairs(value) do spare(item, spared) end
  end
end

---After an error: release what was made, and pass the error on.
local function give_up(made, message)
  for i = 1, #made do if not made[i].kept then made[i]:free() end end
  error(message, 0)
end

local function close_scope(outer, ok, ...)
  local made, spared = scope, {}
  scope = outer
  if not ok then give_up(made, (...)) end
  for i = 1, select("#", ...) do spare((select(i, ...)), spared) end
  for i = 1, #made do
    local tensor = made[i]
    if spared[tensor] then
      if outer then outer[#outer + 1] = tensor end
    elseif not tensor.kept then
      tensor:free()
    end
  end
  return ...
end

---Run `body` and release every tensor made inside that it does not return (directly or inside
---returned tables) and that was not kept with `:keep()`.
---@param body function
---@return any ...  what body returns
function M.scope(body, ...)
  check.type("qm.scope", "body", body, "function")
  local outer = scope
  scope = {}
  return close_scope(outer, pcall(body, ...))
end

local function close_guard(outer, ok, ...)
  local made = scope
  scope = outer
  if not ok then give_up(made, (...)) end
  for i = 1, outer and #made or 0 do outer[#outer + 1] = made[i] end
  return ...
end

---Run `body`; only if it fails, release every tensor made inside that was not kept.
---@param body function
---@return any ...  what body returns
function M.guard(body, ...)
  local outer = scope
  scope = {}
  return close_guard(outer, pcall(body, ...))
end

return M
