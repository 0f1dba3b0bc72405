-- Packing, fitting, double quantization and what a parameter refuses.
local qm = require("quartermoon")
local mpq = require("spec.support.mpq")
local testing = require("spec.support.testing")

local devices = { "reference" }
if testing.device ~= "reference" then devices[2] = testing.device end

---A symmetric parameter of one column and one group whose grid is 0 .. 15 itself.
local function ruler(device, w_bit, residual_bits)
  local on = { device = device, dtype = "i32" }
  return qm.QParam.new { w_bit = w_bit, group_size = -1, residual_bits = residual_bits or 0,
    data = qm.zeros({ w_bit, 1 }, on), scales = qm.ones({ 1, 1 }, { device = device }),
    zeros = qm.zeros({ 1, 1 }, { device = device }),
    residual = residual_bits and qm.zeros({ residual_bits, 1 }, on) or nil }
end

---A column [32, 1] that begins with the given values.
local function column(device, values)
  local rows = {}
  for i = 1, 32 do rows[i] = { values[i] or 0 } end
  return qm.tensor(rows, { device = device })
end

for _, device in ipairs(devices) do
  describe("QParam:pack on " .. device, function()
    it("rounds halves to even, clamps, and packs NaN as 0", function()
      local q = ruler(device, 4)
      q:pack(column(device, { 2.5, 3.5, 0.49, -7, 1e30, 0 / 0, -1 / 0, 1 / 0, 14.5, 15.5 }))
      local codes, expected = q:unpack():totable(), { 2, 4, 0, 0, 15, 0, 0, 15, 14, 15 }
      for i, code in ipairs(expected) do assert.equal(code, codes[i][1]) end
    end)

    it("keeps what the codes lose in the residual", function()
      local q = ruler(device, 4, 8)
      local values = { 2.5, 2.49609375, -0.25, 15.25, 15.75, 7 + 3 / 256 }
      q:pack(column(device, values))
      local codes, w = q:unpack():totable(), q:dequantize("f32", "residual"):totable()
      for i, code in ipairs({ 3, 2, 0, 15, 15, 7 }) do assert.equal(code, codes[i][1]) end
      values[5] = 15 + 127 / 256 -- the end of the range
      for i, value in ipairs(values) do assert.equal(value, w[i][1]) end
    end)

    it("with noise goes up with probability equal to the fraction, and leaves whole values alone", function()
      local q = ruler(device, 8)
      local w = column(device, { 100, 3.3, 0.0625 })
      local sums, steps = { 0, 0, 0 }, 4000
      for step = 1, steps do
        q:pack(w, { rounding = "stochastic", noise = { seed = 1, step = step } })
        local codes = q:unpack()
        local values = codes:host()
        for i = 1, 3 do sums[i] = sums[i] + values[i - 1] end
        codes:free()
      end
      assert.equal(100, sums[1] / steps)
      assert.near(3.3, sums[2] / steps, 4 * math.sqrt(0.3 * 0.7 / steps))
      assert.near(0.0625, sums[3] / steps, 4 * math.sqrt(0.0625 * 0.9375 / steps))
    end)
  end)

  describe("QParam.quantize on " .. device, function()
    local function fitted(w, options)
      options.dtype = options.dtype or "f32"
      return qm.QParam.quantize(w, options)
    end

    it("spans each group from its least to its greatest weight", function()
      local w = column(device, { -1, 2 })
      local q = fitted(w, { asym = false, group_size = -1 })
      assert.near(0.2, q.scales:item(), 1e-7)
      assert.equal(1, q.zeros:item())
      local back = q:dequantize("f32"):totable()
      assert.near(-1, back[1][1], 1e-6)
      assert.near(2, back[2][1], 1e-6)
    end)

    it("keeps 0 on an asymmetric grid, also where no weight is negative", function()
      for _, shift in ipairs({ -0.5, 0, 5, -5 }) do
        local w = qm.rand({ 64, 32 }, { device = device }, shift, shift + 1)
        local q = fitted(w, { w_bit = 4, group_size = 32 })
        -- The widest span is 6 in 15 codes, or 6 in 14: off by half a code at most, or a whole one at
        -- the ends, where the rounded zero point cuts.
        testing.assert_close(w, q:dequantize("f32"), 6 / 14 / math.max(1, math.abs(shift)), "shift " .. shift)
        for _, row in ipairs(mpq.zero_points(q)) do
          for _, zero in ipairs(row) do assert.is_true(zero >= 1 and zero <= 16) end
        end
      end
    end)

    it("never makes a scale of 0 or infinity", function()
      for _, dtype in ipairs({ "f32", "f16", "bf16" }) do
        for _, value in ipairs({ 0, 3, -3, 1e-9, 1e30, 0 / 0, 1 / 0 }) do
          for _, asym in ipairs({ true, false }) do
            local q = fitted(qm.full({ 32, 32 }, value, { device = device }), { asym = asym, dtype = dtype })
            local scale = q.scales:at(1, 1)
            assert.is_true(scale > 0 and scale < math.huge)
          end
        end
      end
      local q = fitted(qm.full({ 32, 32 }, 3, { device = device }), { asym = false })
      assert.near(3, q:dequantize("f32"):at(5, 5), 1e-6)
    end)

    it("finds less squared error with mse than with minmax, and range multiplies the span", function()
      local w = qm.randn({ 128, 32 }, { device = device })
      local function error_of(method)
        return qm.sum_squares(w - fitted(w, { method = method, w_bit = 2, asym = false }):dequantize("f32")):item()
      end
      assert.is_true(error_of("mse") < 0.9 * error_of("minmax"))
      local narrow, wide = fitted(w, { range = 0.7, asym = false }), fitted(w, { asym = false })
      assert.near(0.7, narrow.scales:at(1, 1) / wide.scales:at(1, 1), 1e-5)
    end)

    it("takes groups that do not divide K", function()
      local w = qm.randn({ 96, 32 }, { device = device })
      local q = fitted(w, { group_size = 64, w_bit = 8 })
      assert.same({ 2, 32 }, q.scales.shape)
      testing.assert_close(w, q:dequantize("f32"), 0.01)
    end)
  end)
end

describe("QParam:prepare", function()
  it("undoes double quantization with two roundings", function()
    -- Code 0xA3: scale (10 - 0.5) * 0.25, product zero (3 - 1) * 2.
    local half = { dtype = "f16" }
    local function number(x) return qm.full({ 1, 1, 1 }, x, half) end
    local function parts() return { w_bit = 4, group_size = 32, data = qm.zeros({ 4, 32 }, { dtype = "i32" }),
      qstatistic = qm.full({ 1, 1, 32 }, 0xA3, { dtype = "u8" }), qscales_zeros = number(0.5),
      qscales_scales = number(0.25), qzeros_zeros = number(1), qzeros_scales = number(2) } end
    local q = qm.QParam.new(parts())
    assert.error_matches(function() q:dequantize() end, "call q:prepare() first", 1, true)
    q:prepare():prepare()
    assert.equal("f16", q.scales.dtype)
    assert.equal(9.5 * 0.25, q.scales:at(1, 7))
    assert.equal(4, q.zeros:at(1, 7))
    assert.is_nil(q.qstatistic)
    assert.equal(-4, q:dequantize("f32"):at(3, 3))
  end)

  it("takes scale parameters per column, and leaves groups of 256 their own scales", function()
    local half = { dtype = "f16" }
    local columns = {}
    for n = 1, 32 do columns[n] = { n / 4 } end
    local q = qm.QParam.new { w_bit = 2, asym = true, group_size = 32, data = qm.zeros({ 4, 32 }, { dtype = "i32" }),
      zeros = qm.zeros({ 2, 2 }, { dtype = "i32" }), qscales = qm.full({ 2, 32 }, 200, { dtype = "u8" }),
      qscales_zeros = qm.zeros({ 1, 32, 1 }, half), qscales_scales = qm.tensor({ columns }, half) }
    q:prepare()
    for n = 1, 32 do assert.equal(200 * n / 4, q.scales:at(2, n)) end
    local wide = qm.QParam.new { w_bit = 4, group_size = 256, data = qm.zeros({ 32, 32 }, { dtype = "i32" }),
      scales = qm.ones({ 1, 32 }, half), zeros = qm.ones({ 1, 32 }, half), qscales_zeros = qm.zeros({ 1, 1, 1 }, half) }
    assert.equal(1, wide:prepare().scales:at(1, 1))
    assert.is_nil(wide.qscales_zeros)
  end)
end)

describe("QParam.new", function()
  local function parts(changes)
    local result = { data = qm.zeros({ 8, 32 }, { dtype = "i32" }), scales = qm.ones({ 2, 32 }),
      zeros = qm.ones({ 2, 32 }), w_bit = 4, group_size = 32 }
    for key, value in pairs(changes or {}) do result[key] = value end
    return result
  end
  local function counting(k, first, dtype)
    return qm.arange(first, first + k - 1, { dtype = dtype or "i32" })
  end

  it("takes a q_perm of zeros as the identity, and a g_idx of zeros as none", function()
    local q = qm.QParam.new(parts { q_perm = qm.zeros({ 64 }, { dtype = "i16" }),
      g_idx = qm.zeros({ 64 }, { dtype = "i32" }) })
    assert.is_nil(q.q_perm)
    assert.is_nil(q.g_idx)
    assert.equal(2, q.layer_type)
    assert.is_nil(qm.QParam.new(parts { q_perm = counting(64, 0) }).q_perm)
    local odd = qm.zeros({ 63 }, { dtype = "i16" })
    assert.error_matches(function() qm.QParam.new(parts { q_perm = odd }) end,
      "argument 'q_perm': expected i32 [K=64], got i32 [63]", 1, true)
    assert.equal(1, qm.QParam.new(parts()).layer_type)
  end)

  it("reads 16-bit permutations unsigned", function()
    local k = 33 * 1024
    local rows, bits = {}, {}
    for p = 1, k do
      rows[p] = k - p
      bits[p] = rows[p] >= 32768 and rows[p] - 65536 or rows[p]
    end
    local q = qm.QParam.new { data = qm.zeros({ k / 32, 1 }, { dtype = "i32" }), scales = qm.ones({ 1, 1 }),
      zeros = qm.ones({ 1, 1 }), w_bit = 1, group_size = -1, q_perm = qm.tensor(bits, { dtype = "i16" }) }
    assert.same(rows, q.q_perm:totable())
  end)

  it("gives every parameter an id of its own, unless it is given", function()
    local a, b = qm.QParam.new(parts()), qm.QParam.new(parts())
    assert.not_equal(a.id, b.id)
    assert.equal(7, qm.QParam.new(parts { id = 7 }).id)
    assert.equal(a.id, a:clone().id)
  end)

  it("says what does not fit", function()
    local function refused(message, changes)
      assert.error_matches(function() qm.QParam.new(parts(changes)) end, message, 1, true)
    end
    refused("argument 'w_bit': expected one of 1, 2, 3, 4, 5, 6, 8, got number 7", { w_bit = 7 })
    refused("argument 'scales': expected G=2 groups (K=64 in groups of 32), got 3",
      { scales = qm.ones({ 3, 32 }), zeros = qm.ones({ 3, 32 }) })
    refused("argument 'zeros': expected f32 [G=2, N=32], got f32 [2, 31]", { zeros = qm.ones({ 2, 31 }) })
    refused("argument 'zeros': expected i32 [G=2, zwords=4], got f32 [2, 32]", { asym = true })
    refused("argument 'g_idx': expected groups in [0, G=2), got 2 for row 63",
      { g_idx = qm.tensor((function()
        local groups = {}
        for i = 1, 64 do groups[i] = i == 64 and 2 or 1 end
        return groups
      end)(), { dtype = "i32" }) })
    refused("argument 'q_perm': expected a permutation of 0 .. 63, got 64 at 63", { q_perm = counting(64, 1) })
    refused("argument 'data': expected K * w_bit / 32 word rows, K a multiple of 32; got 6 word rows at w_bit 4",
      { data = qm.zeros({ 6, 32 }, { dtype = "i32" }) })
    refused("argument 'residual': expected one exactly where residual_bits is not 0", { residual_bits = 4 })
    refused("argument 'zero_offset': expected one of 0, 1, got number 2", { zero_offset = 2 })
    refused("unknown option 'group_sise', did you mean 'group_size'?", { group_sise = 1 })
  end)

  it("is checked again at every use, for its fields are in the user's hands", function()
    local q = qm.QParam.new(parts { g_idx = qm.zeros({ 64 }, { dtype = "i32" }):fill(1) })
    q.g_idx:fill(1000000)
    -- On a GPU every look would wait for it: kernels stay inside their arrays, and validate() looks.
    local look = testing.device:match("^cuda") and q.validate or q.dequantize
    assert.error_matches(function() look(q) end, "expected groups in [0, G=2), got 1000000", 1, true)
    q.g_idx = nil
    q.w_bit = 7
    assert.error_matches(function() q:unpack() end, "argument 'w_bit': expected 1, 2, 3, 4, 5, 6 or 8, got 7", 1, true)
    q.w_bit, q.group_size = 4, 0
    assert.error_matches(function() q:validate() end, "argument 'group_size': expected at least 1, got 0", 1, true)
  end)

  it("refuses shapes that codes or zero points cannot fill", function()
    assert.error_matches(function() qm.QParam.quantize(qm.zeros({ 40, 32 })) end,
      "argument 'w': expected K (rows) a multiple of 32, as codes fill whole words, got qm.Tensor f32 [40, 32]",
      1, true)
    assert.error_matches(function() qm.QParam.quantize(qm.zeros({ 64, 40 })) end,
      "argument 'w': expected N (columns) a multiple of 32, as packed zero points fill whole words", 1, true)
    assert.equal(40, qm.QParam.quantize(qm.zeros({ 64, 40 }), { asym = false }).shape[2])
  end)

  it("leaves nothing behind when freed", function()
    collectgarbage()
    collectgarbage()
    local device = qm.default_device()
    local before = device:memory().live_bytes
    local w = qm.randn({ 64, 32 })
    local q = qm.QParam.quantize(w, { residual_bits = 4 })
    q:dequantize("bf16"):free()
    q:unpack():free()
    -- The allocator rounds blocks up, by less than a dense bf16 copy would take.
    local held = device:memory().live_bytes - before - q:size_bytes() - w:size_bytes()
    assert.is_true(held >= 0 and held < 64 * 32 * 2)
    q:free()
    q:free()
    w:free()
    assert.equal(before, device:memory().live_bytes)
  end)
end)
