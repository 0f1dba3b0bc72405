-- Quantized weights from the tensors of files, and back.
local bit = require("bit")
local ffi = require("ffi")
local qm = require("quartermoon")
local mpq = require("spec.support.mpq")
local testing = require("spec.support.testing")

local function i32(values) return qm.tensor(values, { dtype = "i32" }) end

---Random words.
local function words(rows, columns)
  local values = {}
  for row = 1, rows do
    values[row] = {}
    for column = 1, columns do values[row][column] = math.random(0, 2 ^ 32 - 1) - 2 ^ 31 end
  end
  return i32(values)
end

local function scales(groups, n) return qm.rand({ groups, n }, nil, 0.01, 0.02):to("f16") end

---Copies to hand over, and what was handed over.
local function copies(fields)
  local list = {}
  for name, tensor in pairs(fields) do list[name] = tensor:clone() end
  return list
end

local function assert_fields(expected, actual)
  for name, tensor in pairs(expected) do
    assert(actual[name], name .. " is missing")
    assert.equal(tensor.dtype, actual[name].dtype)
    assert.same(tensor.shape, actual[name].shape)
    testing.assert_equal(tensor, actual[name], name)
  end
  for name in pairs(actual) do assert(expected[name], name .. " is there") end
end

local function gptq(k, n, bits, groups, g_idx)
  local fields = { qweight = words(k / 32 * bits, n), qzeros = words(groups, n / 32 * bits), scales = scales(groups, n),
    g_idx = g_idx }
  if not g_idx then
    local values = {}
    for i = 0, k - 1 do values[i + 1] = math.floor(i / (k / groups)) end
    fields.g_idx = i32(values)
  end
  return fields
end

---What `read` does must be refused with these words.
local function refused(message, read) assert.error_matches(read, message, 1, true) end

describe("GPTQ's tensors", function()
  for _, bits in ipairs({ 2, 3, 4, 8 }) do
    it(("are read and written the same, with %d bits, in both conventions, in any order of groups"):format(bits),
      function()
        for _, format in ipairs({ "gptq", "gptq_v2" }) do
          for _, g_idx in ipairs({ false, mpq.random_groups(64, 2):to(testing.device) }) do
            local fields = gptq(64, 32, bits, 2, g_idx or nil)
            local q, note = qm.QParam.import("gptq", copies(fields), { bits = bits, group_size = 32, sym = false,
              checkpoint_format = format })
            assert.truthy(note:find(format .. " has them, as the config says", 1, true))
            assert.equal(g_idx and true or false, q.g_idx ~= nil)
            local points, stored = mpq.zero_points(q), fields.qzeros:totable()
            for n = 0, 31 do
              assert.equal(mpq.stream_field(stored[2], bits, n) + (format == "gptq" and 1 or 0), points[2][n + 1])
            end
            assert_fields(fields, q:export("gptq"))
          end
        end
      end)
  end

  it("have group_size -1 for one group, and need none where the scales tell", function()
    local fields = gptq(96, 32, 4, 1)
    assert.equal(96, qm.QParam.import("gptq", copies(fields), { group_size = -1 }).group_size)
    assert.equal(96, qm.QParam.import("gptq", copies(fields)).group_size)
    assert.equal(32, qm.QParam.import("gptq", gptq(96, 32, 4, 3)).group_size)
  end)

  it("are read in the convention that symmetric zero points prove, and it is said", function()
    local function convention(field, options)
      local fields = gptq(32, 32, 4, 1)
      fields.qzeros:fill(field == 8 and -0x77777778 or 0x77777777)
      local q, note = qm.QParam.import("gptq", fields, options)
      return mpq.zero_points(q)[1][1], note
    end
    assert.equal(8, (convention(7, { checkpoint_format = "gptq" })))
    assert.equal(8, (convention(8, { checkpoint_format = "gptq_v2" })))
    local zero, note = convention(8, { checkpoint_format = "gptq" })
    assert.equal(8, zero)
    assert.equal("the config says gptq, but every zero point is stored as 8, which is gptq_v2's for symmetric "
      .. "weights: they are read so", note)
    assert.equal(8, (convention(7, { checkpoint_format = "gptq_v2", sym = true })))
    assert.equal(9, (convention(8, { checkpoint_format = "gptq", sym = false })))
    assert.equal(9, (convention(8, { zero_points = "v1" })))
  end)

  it("go from one convention to the other field by field, or are refused", function()
    local fields = gptq(32, 32, 4, 1)
    fields.qzeros:fill(0x0E2D4C6B) -- no field is 15; the highest is 0
    local q = qm.QParam.import("gptq", copies(fields), { zero_points = "v1" })
    local out = q:export("gptq", { checkpoint_format = "gptq_v2" })
    assert.equal(0x1F3E5D7C, out.qzeros:at(1, 1))
    local back = qm.QParam.import("gptq", out, { zero_points = "v2" })
    testing.assert_equal(q:dequantize("f32"), back:dequantize("f32"))
    testing.assert_equal(fields.qzeros, back:export("gptq", { checkpoint_format = "gptq" }).qzeros)

    local zero = qm.QParam.import("gptq", copies(fields), { zero_points = "v2" })
    refused("export as gptq: 4 zero points are 0, which files that store them minus one cannot hold: save it as "
      .. "gptq_v2", function() zero:export("gptq", { checkpoint_format = "gptq" }) end)
    fields.qzeros:fill(-1)
    local top = qm.QParam.import("gptq", copies(fields), { zero_points = "v1" })
    assert.equal(16, mpq.zero_points(top)[1][5])
    refused("32 zero points are 16", function() top:export("gptq", { checkpoint_format = "gptq_v2" }) end)
    local wrapped = qm.QParam.import("gptq", copies(fields), { zero_points = "v1 wrapped" })
    assert.equal(0, mpq.zero_points(wrapped)[1][5])
    -- 0 and 1 as GPTQModel stores them: 0x10 - 0x11111111 = 0xEEEEEEFF.
    fields.qzeros:fill(-0x11111101)
    local how = { checkpoint_format = "gptq", sym = false, made_by = "gptqmodel" }
    local borrowed, note = qm.QParam.import("gptq", copies(fields), how)
    assert.same({ 0, 1, 0, 0 }, { unpack(mpq.zero_points(borrowed)[1], 1, 4) })
    assert.equal("zero points are read as GPTQModel stores asymmetric ones in gptq, minus one from whole words", note)
  end)

  it("name the tensor that does not fit", function()
    local function case(message, changes, options)
      local fields = gptq(64, 32, 4, 2)
      for name, value in pairs(changes) do fields[name] = value or nil end
      refused(message, function() qm.QParam.import("gptq", fields, options) end)
    end
    case("qm.QParam.import: argument 'qzeros': expected a tensor, got nothing", { qzeros = false })
    case("argument 'scales': expected float of 2 dimensions, got qm.Tensor i32", { scales = words(2, 32) })
    case("argument 'qweight': expected i32 of 2 dimensions", { qweight = qm.zeros({ 8 }, { dtype = "i32" }) })
    case("argument 'bits': expected 4, as qzeros has 4 words for 32 columns, got number 3", {}, { bits = 3 })
    case("argument 'qzeros': expected i32 [G=2, zwords=4], got i32 [3, 4]", { qzeros = words(3, 4) })
    case("argument 'qweight': expected K * w_bit / 32 word rows", { qweight = words(7, 32) })
    case("argument 'scales': expected G=4 groups (K=64 in groups of 16), got 2", { g_idx = false },
      { group_size = 16 })
    case("argument 'g_idx': expected groups in [0, G=2), got 2", { g_idx = i32({ 1 }):fill(2):clone() and
      qm.full({ 64 }, 2, { dtype = "i32" }) })
    case("the format has no tensor 'q_perm'", { q_perm = words(1, 4) })
    case("expected one of 1, 2, 3, 4, 8, got number 5", { qzeros = words(2, 5) })
  end)
end)

describe("AWQ's tensors", function()
  it("hold columns 0, 2, 4, 6, 1, 3, 5, 7 in a word, without minus one", function()
    local qweight = qm.zeros({ 32, 4 }, { dtype = "i32" })
    qweight:narrow(10, 1):fill(0x76543210) -- row 9: nibble i holds i
    local qzeros = i32({ { 0x76543210, 0, 0, 0 } })
    local q = qm.QParam.import("awq", { qweight = qweight, qzeros = qzeros, scales = qm.ones({ 1, 32 }) })
    local codes, points = q:unpack():totable(), mpq.zero_points(q)
    for column, nibble in ipairs({ 0, 4, 1, 5, 2, 6, 3, 7 }) do
      assert.equal(nibble, codes[10][column])
      assert.equal(nibble, points[1][column])
    end
    assert.equal(0, codes[9][3])
    assert.equal(0, points[1][9])
    assert.equal(1 - 1, q:dequantize("f32"):at(10, 3))
  end)

  it("are read and written the same, and as GPTQ too", function()
    local fields = { qweight = words(64, 8), qzeros = words(2, 8), scales = scales(2, 64) }
    local q = qm.QParam.import("awq", copies(fields), { bits = 4, group_size = 32 })
    assert_fields(fields, q:export("awq"))
    local again = qm.QParam.import("gptq", q:export("gptq"), { sym = false, checkpoint_format = "gptq_v2" })
    testing.assert_equal(q:dequantize("f32"), again:dequantize("f32"))
    refused("the format has no place for g_idx", function()
      again.g_idx = qm.zeros({ 64 }, { dtype = "i32" })
      again:export("awq")
    end)
    refused("argument 'qweight': expected K (rows) a multiple of 32", function()
      qm.QParam.import("awq", { qweight = words(24, 8), qzeros = words(1, 8), scales = scales(1, 64) })
    end)
  end)
end)

---Random tensors as EXL2 has them.
local function exl2(n, permutation)
  local sections = { { w_bit = 8, rows = 32 }, { w_bit = 5, rows = 64 }, { w_bit = 3, rows = 32 },
    { w_bit = 2, rows = 32, group_size = 16 } }
  local q = mpq.random(160, n, { sections = sections })
  local groups = #q.q_groups / 2
  return { q_weight = q.data:to(testing.device), q_scale = words(groups, n / 8),
    q_scale_max = qm.rand({ groups }, nil, 0.5, 2):to("f16"), q_invperm = permutation,
    q_groups = qm.tensor(q.q_groups, { dtype = "i16" }) }
end

describe("EXL2's tensors", function()
  it("have scales (c + 1)^2 q_scale_max / 256 and codes around 2^(bits-1)", function()
    local fields = exl2(32, mpq.permutation(160):to(testing.device))
    local levels, largest = fields.q_scale:totable(), fields.q_scale_max:totable()
    local position = fields.q_invperm:totable()
    local q = qm.QParam.import("exl2", copies(fields))
    local codes, widths, w = q:unpack():totable(), mpq.widths(q), q:dequantize("f32"):totable()
    for feature = 1, 160 do
      local p = position[feature] + 1
      local g = q.group_map:at(p) + 1
      for n = 1, 32 do
        local level = bit.band(bit.rshift(levels[g][math.ceil(n / 8)], 4 * ((n - 1) % 8)), 15) + 1
        local scale = level ^ 2 * largest[g] / 256 -- 11 + 9 bits: f16 rounds them by 2^-11 at most
        local expected = (codes[p][n] - 2 ^ (widths[p] - 1)) * scale
        assert.near(expected, w[feature][n], math.abs(expected) * 2 ^ -11)
      end
    end
    assert_fields(fields, q:export("exl2"))
  end)

  it("train, keep their scales, and are written again", function()
    local q = qm.QParam.import("exl2", exl2(64, mpq.permutation(160):to(testing.device)))
    q.requires_grad = true
    local x, target = qm.randn({ 24, 160 }), qm.randn({ 24, 64 })
    local shape, first, last = q.shape, nil, nil
    local m, v = qm.zeros(shape), qm.zeros(shape)
    local step = 0
    q:add_residual(8)
    for _ = 1, 60 do
      local difference = qm.qlinear(x, q) - target
      local loss = (difference * difference):mean()
      last = loss:item()
      first = first or last
      q:zero_grad()
      loss:backward()
      step = qm.QParam.update(q, { step = step, lr = 1, beta1 = 0.9, beta2 = 0.99, exp_avg_l = m, exp_avg_s = v,
        correct_bias = true })
    end
    assert.is_true(last < 0.5 * first, ("loss %g to %g"):format(first, last))
    local again = qm.QParam.import("exl2", q:export("exl2"))
    testing.assert_equal(q:dequantize("f16"), again:dequantize("f16"))
    local mbwq = qm.QParam.import("mbwq", q:export("mbwq"))
    testing.assert_equal(q:dequantize("f16"), mbwq:dequantize("f16"))
    q:fit(q:dequantize("f32"))
    refused("its scales or zeros have moved away from those that the file had: save it as mbwq",
      function() q:export("exl2") end)
    refused("only what came from an EXL2 file", function() mbwq:export("exl2") end)
  end)

  it("may have columns of padding", function()
    local fields = exl2(64, mpq.permutation(160):to(testing.device))
    local whole = qm.QParam.import("exl2", copies(fields))
    local q, note = qm.QParam.import("exl2", fields, { columns = 50 })
    assert.equal("columns 51 to 64 are padding, and left out", note)
    assert.same({ 160, 50 }, q.shape)
    testing.assert_equal(whole:dequantize("f32"):transpose():narrow(1, 50):transpose(), q:dequantize("f32"))
  end)

  it("name the tensor that does not fit", function()
    local function case(message, changes)
      local fields = exl2(32, mpq.permutation(160):to(testing.device))
      for name, value in pairs(changes) do fields[name] = value end
      refused(message, function() qm.QParam.import("exl2", fields) end)
    end
    case("argument 'q_invperm': expected a permutation of 0 .. 159, at 1, got number 0",
      { q_invperm = qm.zeros({ 160 }, { dtype = "i32" }) })
    case("argument 'q_invperm': expected a permutation of 0 .. 159, at 0, got number -1",
      { q_invperm = qm.full({ 160 }, -1, { dtype = "i32" }) })
    case("argument 'q_invperm': expected i32 [K=160], got i32 [32]", { q_invperm = mpq.permutation(32) })
    case("argument 'q_scale': expected i32 [G=6, N / 8 = 4], and q_scale_max [G]", { q_scale = words(5, 4) })
    case("argument 'q_groups, width of group 0': expected one of 1, 2, 3",
      { q_groups = qm.zeros({ 12 }, { dtype = "i16" }) })
  end)
end)

describe("bitorch-engine's tensors", function()
  it("of one width are read and written the same", function()
    for _, bits in ipairs({ 2, 4 }) do
      local q = mpq.random(64, 40, { w_bit = bits, asym = false, q_perm = mpq.permutation(64), group_size = 32,
        channel_scale = qm.rand({ 64 }, { device = "reference" }, 0.5, 2):to("f16") }):to(testing.device)
      local fields = q:export("mbwq")
      assert.same({ 1, 1, 64 }, fields.channel_scale.shape)
      assert.equal("i16", fields.q_perm.dtype)
      local again = qm.QParam.import("mbwq", copies(fields), { bits = bits })
      assert_fields(fields, again:export("mbwq"))
      local x = qm.randn({ 2, 64 })
      testing.assert_equal(qm.qlinear(x, q), qm.qlinear(x, again))
    end
  end)

  it("of mixed widths are read and written the same, without a permutation too", function()
    local q = mpq.random(64, 5, { sections = { { w_bit = 4, rows = 32 }, { w_bit = 2, rows = 32 } } })
    local again = qm.QParam.import("mbwq", q:export("mbwq"))
    testing.assert_equal(q:dequantize("f32"), again:dequantize("f32"))
    assert.is_nil(again.channel_scale)
    assert.is_nil(again.q_perm)
    assert.equal(2, again.layer_type)
    refused("argument 'q_perm': expected a permutation of 0 .. 63, got 0 at 1", function()
      local fields = q:export("mbwq")
      fields.q_perm:fill(0)
      qm.QParam.import("mbwq", fields)
    end)
  end)

  it("read permutations as unsigned", function()
    local count = 32800 -- beyond 2^15
    local reversed = ffi.new("int32_t[?]", count)
    for i = 0, count - 1 do reversed[i] = count - 1 - i end
    local files = require("quartermoon.qparam_words")
    local q_perm = files.to_i16("spec", "q_perm", reversed, count, "cpu")
    local q = qm.QParam.import("mbwq", { qweight = qm.zeros({ count / 16, 1 }, { dtype = "i32", device = "cpu" }),
      scales = qm.ones({ 1, 1 }, { device = "cpu" }), zeros = qm.ones({ 1, 1 }, { device = "cpu" }), q_perm = q_perm },
      { bits = 2 })
    assert.equal(count - 1, q.q_perm:at(1))
    refused("argument 'q_perm': expected numbers of 16 bits", function()
      files.to_i16("spec", "q_perm", { 65536 }, 1, "cpu")
    end)
  end)

  it("of layer kind 1 want scales with a row for each group", function()
    refused("argument 'scales': expected a row for each group, got qm.Tensor u8 []", function()
      qm.QParam.import("mpq", { qweight = words(4, 32), qstatistic = qm.ones({}, { dtype = "u8" }) }, { bits = 4 })
    end)
  end)

  it("of layer kind 1 are read doubly quantized, and written as they are then", function()
    local function half(value, ...) return qm.full({ ... }, value):to("f16") end
    local q = qm.QParam.import("mpq", { qweight = words(8, 64),
      qstatistic = qm.full({ 2, 2, 32 }, 0x5A, { dtype = "u8" }), qscales_zeros = half(1, 2, 2, 1),
      qscales_scales = half(0.5, 2, 2, 1),
      qzeros_zeros = half(2, 2, 2, 1), qzeros_scales = half(0.25, 2, 2, 1) }, { bits = 4, group_size = 32 })
    assert.equal(2, q.scales:at(2, 64)) -- (5 - 1) / 2
    assert.equal(2, q.zeros:at(1, 1)) -- (10 - 2) / 4
    local again = qm.QParam.import("mpq", q:export("mpq"), { bits = 4, group_size = 32 })
    testing.assert_equal(q:dequantize("f16"), again:dequantize("f16"))
    refused("export as gptq: the format has integer zero points", function() q:export("gptq") end)
    refused("argument 'scales': expected scales, qstatistic or qscales, got nothing", function()
      qm.QParam.import("mpq", { qweight = words(8, 64) }, { bits = 4 })
    end)
  end)
end)

describe("Reading and writing a weight's tensors", function()
  it("leaves nothing to the collector", function()
    local cases = { gptq = gptq(64, 32, 4, 2), exl2 = exl2(32, mpq.permutation(160):to(testing.device)) }
    local q = qm.QParam.import("gptq", gptq(64, 32, 4, 1), { zero_points = "v2" })
    cases.awq = q:export("awq")
    cases.mbwq = mpq.random(64, 40, { w_bit = 4, asym = false, group_size = 32 }):to(testing.device):export("mbwq")
    for kind, fields in pairs(cases) do
      collectgarbage()
      collectgarbage("stop")
      local live = qm.handles_live()
      local again = qm.QParam.import(kind, copies(fields), { bits = kind == "mbwq" and 4 or nil })
      for _, tensor in pairs(again:export(kind)) do tensor:free() end
      again:free()
      local left = qm.handles_live() - live
      collectgarbage("restart")
      assert.equal(0, left, kind)
    end
  end)
end)
