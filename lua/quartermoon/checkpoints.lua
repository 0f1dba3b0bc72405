---Checkpoints: everything a run needs to go on, bit for bit as if it had never stopped.
---
---    qm.checkpoints.save("runs/a", { step = step, model = model, optim = optim, data = data })
---    local state = qm.checkpoints.load("runs/a", { model = model, optim = optim, data = data })
---
---A checkpoint is a folder "000007-step-1400" (the seventh of its run, after step 1400) with
---model.safetensors, optim.safetensors and state.json. It is written under another name, synced
---and renamed: a kill at any instant leaves the checkpoints that were there and perhaps the new one,
---each whole.

local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local files = require("quartermoon.files")
local module = require("quartermoon.nn.module")
local random = require("quartermoon.random")
local safetensors = require("quartermoon.safetensors")
local scopes = require("quartermoon.scope")

local M = {}

local FORMAT = 1
local SCALARS = { "w_bit", "group_size", "asym", "zero_offset", "layer_type", "residual_bits", "q_groups" }

---A field in words, to compare: a list is its numbers. Files from before zero_offset had 1.
local function field(quantized, key)
  local value = quantized[key]
  if key == "zero_offset" and value == nil then value = 1 end
  if type(value) ~= "table" then return tostring(value) end
  local words = {}
  for i, item in ipairs(value) do words[i] = tostring(item) end
  return table.concat(words, " ")
end

---What a quantized parameter is besides its tensors.
local function scalars_of(param)
  local scalars = {}
  for _, key in ipairs(SCALARS) do scalars[key] = param[key] end
  return scalars
end

local function save_model(folder, model, state)
  local tensors = {}
  state.quantized = {}
  for _, entry in ipairs(model:named_parameters()) do
    for _, part in ipairs(module.parts(entry)) do tensors[part.name] = part.tensor end
    if module.is_quantized(entry.param) then state.quantized[entry.name] = scalars_of(entry.param) end
  end
  safetensors.save(folder .. "/model.safetensors", tensors)
end

local function save_optim(folder, optim, state)
  local saved = optim:state()
  state.optim = saved.numbers
  safetensors.save(folder .. "/optim.safetensors", saved.tensors)
end

---Folders of checkpoints, in the order they were written.
---@param folder string
---@return { path: string, step: integer, serial: integer }[]
function M.list(folder)
  local found = {}
  for _, name in ipairs(files.list(check.type("qm.checkpoints.list", "folder", folder, "string")) or {}) do
    local serial, step = name:match("^(%d+)%-step%-(%d+)$")
    if step then
      found[#found + 1] = { path = folder .. "/" .. name, step = tonumber(step), serial = tonumber(serial) }
    end
  end
  table.sort(found, function(a, b) return a.serial < b.serial end)
  return found
end

---The newest checkpoint's folder, or nil and the reason.
---@param folder string
---@return string|nil path, string|nil reason
function M.latest(folder)
  local found = M.list(folder)
  if #found == 0 then return nil, folder .. ": there is no checkpoint" end
  return found[#found].path
end

---Remove all checkpoints but the last `keep`, and what killed runs left half written or half removed: a
---checkpoint loses its name before it loses a file.
local function tidy(folder, keep)
  local found = M.list(folder)
  for i = 1, #found - keep do
    local doomed = found[i].path
    files.rename_folder(doomed, (doomed:gsub("[^/]+$", "partial-%0")))
  end
  for _, name in ipairs(files.list(folder) or {}) do
    if name:match("^partial%-%d+%-step%-%d+$") then files.remove_folder(folder .. "/" .. name) end
  end
end

---What is saved or restored must be what it should be.
local function check_objects(name, options)
  if options.model then check.instance(name, "model", options.model, module.Module, "qm.Module") end
  if options.rng then check.instance(name, "rng", options.rng, random.Generator, "qm.Generator") end
  for _, key in ipairs({ "optim", "data" }) do
    local object = options[key]
    if object and not (type(object) == "table" and object.state and object.load_state) then
      check.fail(name, key, "an object with state() and load_state()", object)
    end
  end
end

local SAVE_OPTIONS = { step = check.required, model = check.optional, optim = check.optional, data = check.optional,
  rng = check.optional, config = check.optional, extra = check.optional, keep = 3 }

---Write a checkpoint.
---@param folder string  made where it is missing
---@param options table  { step, model = a qm.Module, optim = a qm.Optim, data = an object with :state()
---   and :load_state(), rng = a qm.generator (the default generator is always saved), config and extra =
---   tables for JSON (numbers to 14 digits), keep = 3: so many checkpoints stay }
---@return string path   the checkpoint's folder
---@raise when anything cannot be written; the earlier checkpoints are untouched then
function M.save(folder, options)
  local name = "qm.checkpoints.save"
  check.type(name, "folder", folder, "string")
  options = check.options(name, options, SAVE_OPTIONS)
  local step = check.integer(name, "step", options.step, 0, 2 ^ 53)
  local keep = check.integer(name, "keep", options.keep, 1)
  check_objects(name, options)
  local default = random.default
  local state = { format = FORMAT, step = step, config = options.config, extra = options.extra,
    default_rng = { seed = default.seed, draws = default.draws } }
  if options.rng then state.rng = { seed = options.rng.seed, draws = options.rng.draws } end
  if options.data then state.data = options.data:state() end

  files.make_folder(folder)
  local found = M.list(folder)
  local serial = #found > 0 and found[#found].serial + 1 or 1
  local base = ("%06d-step-%d"):format(serial, step)
  local partial, path = folder .. "/partial-" .. base, folder .. "/" .. base
  files.make_folder(partial)
  if options.model then save_model(partial, options.model, state) end
  if options.optim then save_optim(partial, options.optim, state) end
  files.write_json(partial .. "/state.json", state)
  files.rename_folder(partial, path)
  tidy(folder, keep)
  return path
end

-- What a quantized parameter need not have, and what changes the meaning of its codes.
local OPTIONAL_PARTS = { "g_idx", "q_perm", "channel_scale" }

---Refuse a quantized parameter that is not the file's. @return integer|nil  bits of the residual that it
---lacks and the file has
local function match_quantized(name, where, entry, saved, file)
  local q = entry.param
  check.type(where, "quantized." .. entry.name, saved, "table")
  for _, key in ipairs(SCALARS) do
    if key ~= "residual_bits" and field(q, key) ~= field(saved, key) then
      check.fail(where, entry.name .. "." .. key, field(q, key), field(saved, key))
    end
  end
  for _, key in ipairs(OPTIONAL_PARTS) do
    if not q[key] and file:has(entry.name .. "." .. key) then
      binding.raise(("%s: %s: '%s.%s' is there, and the parameter has none"):format(name, file.path, entry.name, key))
    end
  end
  local bits = saved.residual_bits
  if bits == nil or bits == 0 or q.residual then return nil end
  return check.one_of(where, entry.name .. ".residual_bits", bits, { 4, 8 })
end

local function match_tensor(name, file, key, wanted_dtype, wanted_shape)
  local dtype, shape = file:info(key)
  if dtype ~= wanted_dtype or table.concat(shape, ",") ~= table.concat(wanted_shape, ",") then
    binding.raise(("%s: %s: '%s' is %s [%s] there, expected %s [%s]"):format(name, file.path, key, dtype,
      table.concat(shape, ", "), wanted_dtype, table.concat(wanted_shape, ", ")))
  end
end

---Look whether the file has all of the model. @return function  which copies it
local function plan_model(name, where, file, model, state)
  local quantized = check.type(where, "quantized", state.quantized or {}, "table")
  local entries, residuals = model:named_parameters(), {}
  for _, entry in ipairs(entries) do
    local q = entry.param
    local bits = module.is_quantized(q) and match_quantized(name, where, entry, quantized[entry.name], file)
    if bits then
      match_tensor(name, file, entry.name .. ".residual", "i32", { q.shape[1] * bits / 32, q.shape[2] })
      residuals[#residuals + 1] = { q, bits }
    end
    for _, part in ipairs(module.parts(entry)) do
      match_tensor(name, file, part.name, part.tensor.dtype, part.tensor.shape)
    end
  end
  return function()
    for _, pair in ipairs(residuals) do pair[1]:add_residual(pair[2]) end
    for _, entry in ipairs(entries) do
      for _, part in ipairs(module.parts(entry)) do file:read(part.name, part.tensor) end
    end
  end
end

---Read the optimizer's state and let it look. @return table state
local function read_optim(name, file, optim, state)
  local tensors = {}
  local saved = { numbers = state.optim, tensors = tensors }
  for _, key in ipairs(file:names()) do tensors[key] = file:tensor(key, "cpu") end
  if optim.check_state then
    binding.naming(name, file.path .. " with state.json", optim.check_state, optim, saved)
  end
  return saved
end

local function check_generator(where, what, saved)
  check.type(where, what, saved, "table")
  check.integer(where, what .. ".seed", saved.seed, 0, 2 ^ 32 - 1)
  check.integer(where, what .. ".draws", saved.draws, 0, 2 ^ 32 - 1)
end

local function restore(generator, saved) generator.seed, generator.draws = saved.seed, saved.draws end

---First look whether all of it fits, then overwrite: a mismatch must not leave half a run. What has its
---own way of loading goes before the model, whose copy can only fail with the disk.
local function load_all(name, where, files_open, options, state)
  local copy_model = options.model and plan_model(name, where, files_open.model, options.model, state)
  local saved = options.optim and read_optim(name, files_open.optim, options.optim, state)
  if options.rng then check_generator(where, "rng", state.rng) end
  check_generator(where, "default_rng", state.default_rng)
  if options.data then options.data:load_state(state.data) end
  if saved then
    options.optim:load_state(saved)
    for _, tensor in pairs(saved.tensors) do tensor:free() end
  end
  if copy_model then copy_model() end
  if options.rng then restore(options.rng, state.rng) end
  restore(random.default, state.default_rng)
end

---Read a checkpoint into the objects of a run that were made as they were for the first start.
---@param path string  a checkpoint's folder, or one that holds some: then the newest
---@param options table|nil  { model, optim, data, rng }: what to restore; the default generator always is
---@return table state   { step, config, extra, path }
---@raise when there is none, or one does not fit; model, optimizer and generators are as they were then
function M.load(path, options)
  local name = "qm.checkpoints.load"
  check.type(name, "path", path, "string")
  options = check.options(name, options, { model = check.optional, optim = check.optional, data = check.optional,
    rng = check.optional })
  check_objects(name, options)
  if not files.exists(path .. "/state.json") then
    local newest, reason = M.latest(path)
    path = newest or binding.raise(name .. ": " .. reason)
  end
  local state, where = files.assert(name, files.read_json(path .. "/state.json")), name .. ": " .. path .. "/state.json"
  check.type(where, "the whole", state, "table")
  if state.format ~= FORMAT then check.fail(where, "format", "checkpoint format " .. FORMAT, state.format) end
  check.integer(where, "step", state.step, 0)
  local files_open = {}
  local ok, message = pcall(function()
    for _, part in ipairs({ "model", "optim" }) do
      files_open[part] = options[part] and safetensors.open(("%s/%s.safetensors"):format(path, part))
    end
    scopes.guard(load_all, name, where, files_open, options, state)
  end)
  for _, file in pairs(files_open) do if file then file:close() end end
  if not ok then error(message, 0) end
  return { step = state.step, config = state.config, extra = state.extra, path = path }
end

return M
