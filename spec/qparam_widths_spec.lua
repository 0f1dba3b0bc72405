-- Codes of 3, 5 and 6 bits, whose fields straddle words, and parameters of mixed widths.
local ffi = require("ffi")
local qm = require("quartermoon")
local mpq = require("spec.support.mpq")
local testing = require("spec.support.testing")

local REFERENCE = { device = "reference" }

---Sections of all widths and of group sizes that differ, 320 rows; `small`: three widths, 128 rows.
local ALL = { { w_bit = 8, rows = 32 }, { w_bit = 6, rows = 64, group_size = 64 }, { w_bit = 5, rows = 64 },
  { w_bit = 4, rows = 32, group_size = 24 }, { w_bit = 3, rows = 64, group_size = 64 },
  { w_bit = 2, rows = 32, group_size = 16 }, { w_bit = 1, rows = 32 } }
local SMALL = { { w_bit = 5, rows = 32 }, { w_bit = 3, rows = 64 }, { w_bit = 2, rows = 32 } }

---Random parameters of every kind of layout: { name, q }.
local function layouts(n, options)
  local list = {}
  local function add(name, k, columns, extra)
    for key, value in pairs(options or {}) do if extra[key] == nil then extra[key] = value end end
    list[#list + 1] = { name = name, q = mpq.random(k, columns, extra) }
  end
  for _, w_bit in ipairs({ 3, 5, 6 }) do
    add(w_bit .. " bit asym", 96, math.ceil(n / 32) * 32, { w_bit = w_bit, group_size = 64,
      g_idx = mpq.random_groups(96, 2) })
    add(w_bit .. " bit sym", 64, n, { w_bit = w_bit, asym = false, group_size = 24, q_perm = mpq.permutation(64) })
  end
  add("4 bit, zero points from 0", 64, 64, { w_bit = 4, zero_offset = 0, group_size = 32 })
  add("3 bit, zero points from 0", 64, 64, { w_bit = 3, zero_offset = 0, group_size = 32 })
  add("all widths", 320, n, { sections = ALL, q_perm = mpq.permutation(320) })
  add("three widths", 128, n, { sections = SMALL })
  return list
end

local function with(options, changes)
  local merged = {}
  for key, value in pairs(options) do merged[key] = value end
  for key, value in pairs(changes) do merged[key] = value end
  return merged
end

describe("Packed codes of any width", function()
  it("are a stream of bits along K: 3 bits", function()
    -- Rows 0 .. 31 hold row % 8; row 10 straddles words 0 and 1, row 21 words 1 and 2.
    local words = { 0, 0, 0 }
    for row = 0, 31 do
      for b = 0, 2 do
        if math.floor(row % 8 / 2 ^ b) % 2 == 1 then
          local at = 3 * row + b
          words[math.floor(at / 32) + 1] = words[math.floor(at / 32) + 1] + 2 ^ (at % 32)
        end
      end
    end
    assert.same({ 0x88FAC688, 0xC688FAC6, 0xFAC688FA }, words) -- the octal digits 76543210 again and again
    local data = {}
    for i, word in ipairs(words) do data[i] = { word >= 2 ^ 31 and word - 2 ^ 32 or word } end
    local q = qm.QParam.new { data = qm.tensor(data, { dtype = "i32" }), w_bit = 3, group_size = -1,
      scales = qm.ones({ 1, 1 }), zeros = qm.zeros({ 1, 1 }) }
    for row, code in ipairs(q:unpack():totable()) do assert.equal((row - 1) % 8, code[1]) end
    assert.equal("qm.QParam 32 x 1, 3 bit sym, group 32", tostring(q))
  end)

  it("lie where the list of groups says", function()
    for _, n in ipairs({ 3, 33 }) do
      local q = mpq.random(320, n, { sections = ALL, dtype = "f16", q_perm = mpq.permutation(320) })
      local words, codes = q.data:totable(), q:unpack():totable()
      local scales, zeros, perm = q.scales:totable(), q.zeros:totable(), q.q_perm:totable()
      local w = q:dequantize("f32"):totable()
      for g = 1, #q.q_groups / 2 do
        local bits, first = q.q_groups[2 * g - 1], q.q_groups[2 * g]
        for column = 1, n do
          local stream = {}
          for row = first + 1, #words do stream[#stream + 1] = words[row][column] end
          local map = q.group_map:totable()
          local i = 0
          for p = 1, 320 do
            if map[p] == g - 1 then
              local code = mpq.stream_field(stream, bits, i)
              assert.equal(code, codes[p][column])
              assert.equal(tonumber(ffi.new("float", code * scales[g][column] - zeros[g][column])),
                w[perm[p] + 1][column])
              i = i + 1
            end
          end
          assert.equal(({ 32, 64, 32, 32, 24, 8, 64, 16, 16, 32 })[g], i)
        end
      end
    end
  end)

  it("come with bitorch-engine's maps", function()
    local q = mpq.random(128, 1, { sections = SMALL })
    local map, rows = q:bie_groups()
    assert.same({ 0, 0, 32, 32, 96, 128, 16 + 4 + 2 }, rows)
    assert.same({ 0, 32, 0, 31 }, { map[1], map[2], map[3], map[4] })
    assert.same({ 3, 1 }, { map[255], map[256] })
    assert.equal(256, #map)
    assert.near((5 + 3 * 2 + 2) / 4, q:bits(), 1e-12)
    assert.equal("qm.QParam 128 x 1, 5/3/2 bit sym, 3.25 on average", tostring(q))
    assert.is_nil((mpq.random(32, 32):bie_groups()))
  end)

  it("pack to what they were", function()
    for _, case in ipairs(layouts(37, { residual_bits = 8, dtype = "f32" })) do
      local q = case.q
      local codes, residual = q.data:bytes(), q.residual:bytes()
      q:pack(q:dequantize("f32", "residual"))
      assert.equal(codes, q.data:bytes(), case.name)
      assert.equal(residual, q.residual:bytes(), case.name)
    end
  end)

  it("can be within half a step of every weight", function()
    for _, case in ipairs(layouts(33)) do
      local q, w = case.q, qm.randn(case.q.shape, REFERENCE, 0, 0.1)
      q:fit(w):pack(w)
      local near, exact, scales = q:dequantize("f32"):totable(), w:totable(), q.scales:totable()
      for p = 1, q.shape[1] do
        local g, k = mpq.place(q, p)
        for n = 1, q.shape[2] do
          -- A rounded zero point, and one that starts at 1, cut off up to a step at the ends.
          assert.is_true(math.abs(near[k][n] - exact[k][n]) <= (q.asym and 1.01 or 0.51) * scales[g][n], case.name)
        end
      end
    end
  end)

  it("have zero points from 0 where the file has them", function()
    local q = mpq.random(64, 32, { w_bit = 4, zero_offset = 0, group_size = 32 })
    q:fit(qm.rand({ 64, 32 }, REFERENCE)) -- no weight is negative
    for _, row in ipairs(mpq.zero_points(q)) do
      for _, zero in ipairs(row) do assert.equal(0, zero) end
    end
  end)
end)

describe("The kernels of any width give the reference's bits:", function()
  it("unpack, dequantize, pack, fit", function()
    for _, n in ipairs({ 1, 131, 1056 }) do
      for i, case in ipairs(layouts(n, { residual_bits = n == 131 and 4 or 0 })) do
        local q, r = case.q, case.q:to(testing.device)
        local w = qm.randn(q.shape, REFERENCE, 0, 1.2):to(({ "f32", "bf16", "f16" })[i % 3 + 1])
        local w_there = w:to(testing.device)
        testing.assert_equal(q:unpack(), r:unpack(), case.name)
        for _, form in ipairs({ "codes", "residual", "bie" }) do
          testing.assert_equal(q:dequantize("f32", form), r:dequantize("f32", form), case.name)
        end
        for step = 0, 1 do
          local options = step == 0 and {} or { rounding = "stochastic", noise = { seed = 3, step = step } }
          q:pack(w, options)
          r:pack(w_there, options)
          testing.assert_equal(q.data, r.data, case.name)
          if q.residual then testing.assert_equal(q.residual, r.residual, case.name) end
        end
        for _, method in ipairs(n == 131 and { "minmax", "mse" } or { "minmax" }) do
          q:fit(w, method, 0.9)
          r:fit(w_there, method, 0.9)
          testing.assert_equal(q.scales, r.scales, case.name)
          testing.assert_equal(q.zeros, r.zeros, case.name)
        end
        r:free()
      end
    end
  end)

  for _, feedback in ipairs({ "none", "momentum", "residual" }) do
    it("the update step, feedback " .. feedback, function()
      for _, n in ipairs({ 33, 1184 }) do
        for i, case in ipairs(layouts(n, { residual_bits = feedback == "residual" and 8 or 0 })) do
          local q, r = case.q, case.q:to(testing.device)
          local grad, m = qm.randn(q.shape, REFERENCE, 0, 0.3), qm.randn(q.shape, REFERENCE, 0, 0.1)
          local v = m * m
          if i % 3 == 0 then m, v = m:to("bf16"), v:to("bf16") end
          local there = { grad:to(testing.device), m:to(testing.device), v:to(testing.device) }
          local before = q.data:bytes()
          for step = 0, 1 do
            local o = { step = step, lr = step == 0 and 0.3 or 0.02, weight_decay = 0.1, beta1 = 0.9, beta2 = 0.99,
              seed = 5, feedback = feedback, rounding = feedback == "none" and step == 0 and "nearest" or nil }
            qm.QParam.update(q, with(o, { grad = grad, exp_avg_l = m, exp_avg_s = v }))
            qm.QParam.update(r, with(o, { grad = there[1], exp_avg_l = there[2], exp_avg_s = there[3] }))
            testing.assert_equal(q.data, r.data, case.name)
            if q.residual then testing.assert_equal(q.residual, r.residual, case.name) end
            testing.assert_equal(m, there[2], case.name)
            testing.assert_equal(v, there[3], case.name)
          end
          assert.not_equal(before, q.data:bytes())
          r:free()
        end
      end
    end)
  end

  it("the update step as the original", function()
    for _, case in ipairs(layouts(33)) do
      local q, r = case.q, case.q:to(testing.device)
      local grad, m = qm.randn(q.shape, REFERENCE), qm.randn(q.shape, REFERENCE, 0, 0.1)
      local v = m * m
      local there = { grad:to(testing.device), m:to(testing.device), v:to(testing.device) }
      local zeros = q.zeros:bytes()
      for step = 3, 4 do
        local o = { mode = "bie", step = step, lr = 0.5 }
        qm.QParam.update(q, with(o, { grad = grad, exp_avg_l = m, exp_avg_s = v }))
        qm.QParam.update(r, with(o, { grad = there[1], exp_avg_l = there[2], exp_avg_s = there[3] }))
        testing.assert_equal(q.data, r.data, case.name)
        testing.assert_equal(q.zeros, r.zeros, case.name)
        testing.assert_equal(m, there[2], case.name)
      end
      assert.not_equal(zeros, q.zeros:bytes())
    end
  end)
end)

describe("Parameters of any width train:", function()
  it("every integer of a step is what plain Lua derives", function()
    for _, case in ipairs(layouts(3, { residual_bits = 4, dtype = "f32" })) do
      local q = case.q
      local grad, m = qm.randn(q.shape, REFERENCE, 0, 0.3), qm.randn(q.shape, REFERENCE, 0, 0.1)
      local v = m * m
      local o = { step = 2, lr = 0.02, lr_next = 0.02, weight_decay = 0.1, beta1 = 0.9, beta2 = 0.99, eps = 1e-6,
        correct_bias = true, rounding = "stochastic", feedback = "residual", seed = 17 }
      local codes, first, _, residuals = mpq.update(q, grad:totable(), m:totable(), v:totable(), o)
      local r = q:to(testing.device)
      m, v = m:to(testing.device), v:to(testing.device)
      qm.QParam.update(r, with(o, { grad = grad:to(testing.device), exp_avg_l = m, exp_avg_s = v }))
      assert.same(codes, r:unpack():totable(), case.name)
      assert.same(first, m:totable(), case.name)
      assert.same(residuals, mpq.residuals(r), case.name)
    end
  end)

  it("qlinear has the gradients that central differences show, also with a channel scale", function()
    local options = { device = "reference", requires_grad = true }
    for _, columns in ipairs({ 3, 35 }) do
      for _, case in ipairs(layouts(columns, { dtype = "f32" })) do
        local k = case.q.shape[1]
        case.q.channel_scale = k < 320 and qm.rand({ k }, REFERENCE, 0.5, 2):keep() or nil
        if k < 320 and (columns == 3) == (k == 128) then
          testing.check_gradients(function(x) return qm.qlinear(x, case.q) end, { qm.randn({ 2, k }, options) })
        end
      end
    end
  end)

  it("qlinear scales the activations, and gathers the gradient of the scaled ones", function()
    for _, rows in ipairs({ 3, 200 }) do
      for _, case in ipairs(layouts(33)) do
        local k, n = case.q.shape[1], case.q.shape[2]
        local q = case.q:to(testing.device)
        local plain = q:clone()
        q.channel_scale = qm.rand({ k }, nil, 0.5, 2):to("f16"):keep()
        local x, dout = qm.randn({ rows, k }):requires_gradient(), qm.randn({ rows, n })
        local scaled = (x:to("f32") * q.channel_scale:to("f32")):requires_gradient()
        local out, expected = qm.qlinear(x, q), qm.qlinear(scaled, plain)
        testing.assert_close(expected, out, 1e-6, case.name)
        out:backward(dout)
        expected:backward(dout)
        testing.assert_close(plain.privileged_grad, q.privileged_grad, 1e-5, case.name)
        testing.assert_close(scaled.grad * q.channel_scale:to("f32"), x.grad, 1e-5, case.name)
        q:free()
        plain:free()
      end
    end
  end)

  it("a checkpoint keeps mixed widths", function()
    local path = os.tmpname()
    os.remove(path)
    local function model()
      local q = qm.QParam.quantize(qm.randn({ 128, 8 }), { sections = SMALL, channel_scale = qm.rand({ 128 }) })
      return qm.nn.QLinear.from(q)
    end
    local saved, loaded = model(), model()
    qm.checkpoints.save(path, { step = 1, model = saved })
    qm.checkpoints.load(path, { model = loaded })
    local x = qm.randn({ 2, 128 })
    testing.assert_equal(saved:forward(x), loaded:forward(x))
    local other = qm.nn.QLinear.from(qm.QParam.quantize(qm.randn({ 128, 8 }), { channel_scale = qm.rand({ 128 }),
      sections = { { w_bit = 5, rows = 32 }, { w_bit = 3, rows = 64, group_size = 64 }, { w_bit = 2, rows = 32 } } }))
    assert.error_matches(function() qm.checkpoints.load(path, { model = other }) end, "weight.group_size", 1, true)
    local plain = qm.nn.QLinear.from(qm.QParam.quantize(qm.randn({ 128, 8 }), { sections = SMALL }))
    assert.error_matches(function() qm.checkpoints.load(path, { model = plain }) end,
      "'weight.channel_scale' is there, and the parameter has none", 1, true)
    os.execute("rm -r '" .. path .. "'")
  end)
end)

describe("A list of groups", function()
  local function refused(message, q_groups, words, parts)
    parts = parts or {}
    parts.data, parts.q_groups = qm.zeros({ words, 4 }, { dtype = "i32" }), q_groups
    parts.scales = parts.scales or qm.ones({ math.floor(#q_groups / 2), 4 })
    parts.zeros = parts.zeros or qm.zeros({ math.floor(#q_groups / 2), 4 })
    assert.error_matches(function() qm.QParam.new(parts) end, message, 1, true)
  end

  it("is refused where it does not fit, by group", function()
    refused("width of group 1': expected one of 1, 2, 3, 4, 5, 6, 8, got number 7", { 8, 0, 7, 8 }, 15)
    refused("expected group 0 at word row 0, got 1", { 4, 1 }, 5)
    refused("expected whole rows of 3 bits in group 0, got word rows 0 to 4 (of 7)", { 3, 0, 3, 4 }, 7)
    refused("expected whole rows of 4 bits in group 0, got word rows 0 to 0", { 4, 0, 4, 0 }, 4)
    refused("expected whole rows of 4 bits in group 1, got word rows 9 to 8", { 4, 0, 4, 9 }, 8)
    refused("expected widths in descending order, got 8 after 4", { 4, 0, 8, 4 }, 12)
    refused("expected a multiple of 32 rows of 2 bits, got 16", { 4, 0, 2, 4 }, 5)
    refused("expected two numbers for each group, got 3", { 4, 0, 2 }, 4)
    refused("argument 'scales': expected float [G", { 4, 0 }, 4, { scales = qm.ones({ 1, 3 }) })
    refused("argument 'group_map': expected groups in [0, G=1), got 1 for packed row 32", { 4, 0, 4, 4 }, 8,
      { scales = qm.ones({ 1, 4 }), zeros = qm.zeros({ 1, 4 }) })
    refused("mixed widths have float zeros", { 4, 0 }, 4, { asym = true })
    refused("expected a permutation of 0 .. 31, got 0 at 1", { 4, 0 }, 4, { q_perm = qm.zeros({ 32 },
      { dtype = "i16" }) })
    refused("argument 'channel_scale': expected float [K=32]", { 4, 0 }, 4, { channel_scale = qm.ones({ 31 }) })
  end)
end)
