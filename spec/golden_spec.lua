-- Replays recorded update steps of the original system (bitorch-engine), every file mpq_*.safetensors
-- of $QM_GOLDEN (default ../shared/golden beside the tree), and reads weights in every format of files,
-- fmt_*.safetensors. The files' metadata say everything. Then what transformers computed from the model
-- folders under hf/.
local qm = require("quartermoon")
local hf_folder = require("spec.support.hf_folder")
local mpq = require("spec.support.mpq")
local testing = require("spec.support.testing")

local folder = os.getenv("QM_GOLDEN") or "../shared/golden"

local function list(pattern)
  local names = {}
  local pipe = io.popen("ls -d '" .. folder .. "'/" .. pattern .. " 2>/dev/null")
  for line in pipe:lines() do names[#names + 1] = line end
  pipe:close()
  return names
end

---A file as tables: metadata and a function that reads a tensor (or gives nil).
local function open(path)
  local file = qm.safetensors.open(path)
  local known = {}
  for _, name in ipairs(file:names()) do known[name] = true end
  return {
    metadata = file.metadata,
    has = function(name) return known[name] or false end,
    read = function(name) return known[name] and file:tensor(name, testing.device) or nil end,
  }
end

---A projector that is given the recorded matrices: one computed at an update serves until the next.
local function recorded_projector(file, meta)
  if meta.projector == "none" then return nil end
  local left, right
  return {
    inject = function(self, tag)
      local new_left, new_right = file.read("proj_left_" .. tag), file.read("proj_right_" .. tag)
      if not (new_left or new_right) then return end
      left, right = new_left, new_right
      self.galore = qm.projector.galore({ rank = tonumber(meta.rank), scale = tonumber(meta.scale),
        proj_type = left and right and "full" or left and "left" or "right" })
      self.galore:inject({ left = left, right = right })
    end,
    project = function(self, grad, step) return self.galore:project(grad, step) end,
    project_back = function(self, low) return self.galore:project_back(low) end,
  }
end

local function parameter(file, meta)
  local layer_type = tonumber(meta.layer_type)
  return qm.QParam.new {
    data = file.read("qweight"), scales = file.read("scales"), zeros = file.read("zeros"),
    g_idx = layer_type == 1 and file.read("g_idx") or nil, q_perm = file.read("q_perm"),
    w_bit = tonumber(meta.bits), asym = meta.asym == "true", group_size = tonumber(meta.group_size),
    layer_type = layer_type,
  }
end

local DTYPES = { float32 = "f32", float16 = "f16", bfloat16 = "bf16" }

local function replay(path)
  local file = open(path)
  local meta = file.metadata
  local q = parameter(file, meta)
  local projector = recorded_projector(file, meta)
  local m, v = file.read("exp_avg_l_00"), file.read("exp_avg_s_00")
  testing.assert_equal(file.read("weight_00"), q:dequantize(nil, "bie"), "weight_00")
  local step = tonumber(meta.step0)
  for update = 1, tonumber(meta.steps) do
    local tag = ("%02d"):format(update)
    local grad, low = file.read("grad_" .. tag), nil
    if projector then
      projector:inject(tag)
      local cast = grad:to(m.dtype)
      low = file.read("lowrank_" .. tag)
      testing.assert_close(low, projector:project(cast, step), 1e-5, "lowrank_" .. tag)
      -- We go on with the recorded one: in the gradient's own singular basis it is diagonal, the rest
      -- is rounding noise, and Adam makes directions of noise.
    end
    step = qm.QParam.update(q, {
      mode = "bie", step = step, exp_avg_l = m, exp_avg_s = v, grad = low or grad, projector = projector,
      lr = tonumber(meta.lr), beta1 = tonumber(meta.beta1), beta2 = tonumber(meta.beta2), eps = tonumber(meta.eps),
      weight_decay = tonumber(meta.weight_decay), correct_bias = meta.correct_bias == "true",
      dtype = DTYPES[meta.compute_dtype],
    })
    testing.assert_equal(file.read("qweight_" .. tag), q.data, "qweight_" .. tag)
    local zeros = file.read("zeros_" .. tag)
    if q.asym or zeros.dtype == "f16" then
      testing.assert_equal(zeros, q.zeros, "zeros_" .. tag)
    else
      testing.assert_close(zeros, q.zeros, 1e-6, "zeros_" .. tag)
    end
    testing.assert_close(file.read("exp_avg_l_" .. tag), m, 1e-6, "exp_avg_l_" .. tag)
    testing.assert_close(file.read("exp_avg_s_" .. tag), v, 1e-6, "exp_avg_s_" .. tag)
  end
  assert.equal(tonumber(meta.step0) + tonumber(meta.steps), step)
  local last = ("weight_%02d"):format(tonumber(meta.steps))
  if q.asym or q.zeros.dtype == "f16" then
    testing.assert_equal(file.read(last), q:dequantize(nil, "bie"), last)
  else
    testing.assert_close(file.read(last), q:dequantize(nil, "bie"), 1e-6, last)
  end
end

describe("The original's recorded update steps", function()
  local paths = list("mpq_*.safetensors")
  if #paths == 0 then
    it("are replayed", function() pending("no mpq_*.safetensors in " .. folder .. " (set QM_GOLDEN)") end)
  end
  for _, path in ipairs(paths) do
    it("come out of ours: " .. path:match("([^/]+)%.safetensors$"), function() replay(path) end)
  end

  for _, path in ipairs(list("mpq_*.safetensors")) do
    local file = open(path)
    if file.has("qscales_zeros") then
      it("start from scales that prepare() makes of double quantization: " .. path:match("([^/]+)$"), function()
        local meta = file.metadata
        local parts = { data = file.read("qweight"), w_bit = tonumber(meta.bits), asym = meta.asym == "true",
          group_size = tonumber(meta.group_size), q_perm = file.read("q_perm"),
          layer_type = tonumber(meta.layer_type), zeros = meta.asym == "true" and file.read("zeros") or nil }
        for _, name in ipairs({ "qstatistic", "qscales", "qscales_zeros", "qscales_scales", "qzeros_zeros",
          "qzeros_scales" }) do parts[name] = file.read(name) end
        local q = qm.QParam.new(parts):prepare()
        testing.assert_equal(file.read("scales"), q.scales, "scales")
        testing.assert_equal(file.read("zeros"), q.zeros, "zeros")
        assert.is_nil(q.qscales_zeros)
      end)
    end
  end
end)

---------------------------------------------------------------------------------------------------

---A weight of a fmt_ file: { format, tensors by their names in weights' files, options, what to compare }.
local FORMATS = {
  fmt_gptq_w3 = { { "gptq", { qweight = "qweight", qzeros = "qzeros", scales = "scales", g_idx = "g_idx" },
    weight = "weight" } },
  fmt_awq_gemm = { { "awq", { qweight = "qweight", qzeros = "qzeros", scales = "scales" }, weight = "weight" } },
  fmt_mbwq_q4 = { { "mbwq", { qweight = "qweight", scales = "scales", zeros = "zeros", q_perm = "q_perm" },
    weight = "weight" },
    { "mbwq", { qweight = "qweight", scales = "scales", zeros = "zeros" }, weight = "weight_zero_perm" } },
  fmt_exl2_mixed = { { "exl2", { q_weight = "q_weight", q_scale = "q_scale", q_scale_max = "q_scale_max",
    q_invperm = "q_invperm", q_groups = "q_groups" }, weight = "weight_exl2" },
    { "mbwq", { qweight = "q_weight", scales = "scales", zeros = "zeros", q_perm = "q_perm", q_groups = "q_groups",
      channel_scale = "channel_scale" }, weight = "weight_bie" } },
}
FORMATS.fmt_mbwq_q2 = FORMATS.fmt_mbwq_q4

local function assert_same_codes(file, q)
  if file.has("codes") then testing.assert_equal(file.read("codes"), q:unpack(), "codes") end
  if file.has("zero_points") and q.asym then
    local points = qm.tensor(mpq.zero_points(q), { dtype = file.read("zero_points").dtype })
    testing.assert_equal(file.read("zero_points"), points, "zero_points")
  end
  if not q.sections then return end
  local map, rows = q:bie_groups()
  testing.assert_equal(file.read("q_group_map"), qm.tensor(map, { dtype = "i16" }), "q_group_map")
  testing.assert_equal(file.read("rows"), qm.tensor(rows, { dtype = "i32" }), "rows")
end

local function replay_format(file, case)
  local fields = {}
  for field, name in pairs(case[2]) do fields[field] = file.read(name) end
  local bits = tonumber(file.metadata.bits)
  local q = qm.QParam.import(case[1], fields, { bits = bits, group_size = tonumber(file.metadata.group_size),
    sym = false })
  local weight = file.read(case.weight)
  assert_same_codes(file, q)
  testing.assert_equal(weight, q:dequantize(weight.dtype), case.weight)
  local data = q.data:bytes()
  q:pack(q:dequantize("f32"))
  assert.equal(data, q.data:bytes())
  for field, tensor in pairs(q:export(case[1])) do
    if case[2][field] then testing.assert_equal(file.read(case[2][field]), tensor, field) end
  end
end

describe("Weights as files have them", function()
  for name, cases in pairs(FORMATS) do
    for _, case in ipairs(cases) do
      it(("are read as their programs do, and written the same: %s, %s"):format(name, case.weight), function()
        local path = list(name .. ".safetensors")[1]
        if not path then return pending("no " .. name .. ".safetensors in " .. folder .. " (set QM_GOLDEN)") end
        replay_format(open(path), case)
      end)
    end
  end
end)

---------------------------------------------------------------------------------------------------

describe("Model folders and what transformers computed from them:", function()
  local folders = list("hf/*/config.json")
  if #folders == 0 then
    it("all of them", function() pending("no hf/*/config.json in " .. folder .. " (set QM_GOLDEN)") end)
  end
  for _, path in ipairs(folders) do
    local at = path:match("^(.*)/config%.json$")
    local name = at:match("[^/]+$")
    it(name, function() hf_folder.replay(at) end)
    if qm.files.exists(at .. "/config.legacy.json") then
      it(name .. ", its configuration of the older generation", function() hf_folder.replay_legacy(at) end)
    end
  end
end)
