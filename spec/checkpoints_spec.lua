local qm = require("quartermoon")
local files = require("quartermoon.files")

local CONFIG = { vocab_size = 32, hidden_size = 32, intermediate_size = 64, num_hidden_layers = 1,
  num_attention_heads = 2, max_position_embeddings = 16 }

---A folder of our own, removed afterwards.
local function with_folder(body)
  local folder = os.tmpname()
  os.remove(folder)
  local ok, problem = pcall(body, folder)
  os.execute("rm -rf '" .. folder .. "'")
  if not ok then error(problem, 0) end
end

---A run that does not depend on anything outside it: the data are draws of its own generator.
local Run = {}
Run.__index = Run

local function new_run(linear, optim_options)
  qm.seed(11)
  local self = setmetatable({ rng = qm.generator(5), losses = {} }, Run)
  self.model = qm.models.llama.new(CONFIG, { dtype = "f32", linear = linear })
  self.optim = qm.optim.new(self.model, optim_options)
  self.data = { position = 0, state = function(data) return { position = data.position } end,
    load_state = function(data, state) data.position = state.position end }
  return self
end

function Run:steps(first, last)
  for step = first, last do
    local draws = self.rng:rand({ 17 }, nil, 0, CONFIG.vocab_size):to("i32"):totable()
    local offset = self.data.position % 3 -- so that the position matters
    local tokens, targets = {}, {}
    for i = 1, 16 do tokens[i], targets[i] = draws[i], (draws[i] + offset) % CONFIG.vocab_size end
    local i32 = { dtype = "i32" }
    local loss = self.model:loss(qm.tensor(tokens, i32), qm.tensor(targets, i32), { 0, 9, 16 })
    self.losses[step] = loss:item()
    loss:backward()
    self.optim:clip_grad_norm(1)
    self.optim:step()
    self.optim:zero_grad()
    self.data.position = self.data.position + 1
  end
end

function Run:save(folder, step, keep)
  return qm.checkpoints.save(folder, { step = step, model = self.model, optim = self.optim, data = self.data,
    rng = self.rng, config = CONFIG, keep = keep })
end

function Run:load(path)
  return qm.checkpoints.load(path, { model = self.model, optim = self.optim, data = self.data, rng = self.rng })
end

---Every bit of a run's weights.
function Run:bytes()
  local parts = {}
  for _, entry in ipairs(self.model:named_parameters()) do
    for _, part in ipairs(require("quartermoon.nn.module").parts(entry)) do parts[#parts + 1] = part.tensor:bytes() end
  end
  return table.concat(parts)
end

---Every weight of a checkpoint of the child below is the step it was written after.
local function assert_whole(found)
  qm.safetensors.with(found.path .. "/model.safetensors", function(file)
    assert.is_true(#file:names() > 10)
    for _, name in ipairs(file:names()) do
      local tensor = file:tensor(name, "cpu")
      local values = tensor:reshape(tensor:count())
      assert.equal(found.step, values:min():item(), name)
      assert.equal(found.step, values:max():item(), name)
    end
  end)
end

local KINDS = {
  ["dense"] = { { kind = "dense" }, { lr = qm.schedule.cosine(1e-2, 40), weight_decay = 0.1 } },
  ["4 bit"] = { { group_size = 32 }, { lr = 1e-2 } },
  ["2 bit, residual, bf16 moments"] = { { w_bit = 2, group_size = 32 }, { lr = 1e-2, moments = "bf16" } },
  ["8 bit, refitted"] = { { w_bit = 8, group_size = 32 }, { lr = 1e-2, grid = "refit", refit_every = 7 } },
  ["4 bit, projected"] = { { group_size = 32 }, { lr = 1e-2, projector = function(param)
    return #param.shape == 2 and qm.projector.galore({ rank = 4, update_proj_gap = 7 }) or nil
  end } },
  ["dense, bf16 moments"] = { { kind = "dense" }, { lr = 1e-2, moments = "bf16", seed = 4 } },
}

describe("qm.checkpoints", function()
  for kind, options in pairs(KINDS) do
    it("resumes bit for bit: " .. kind, function()
      with_folder(function(folder)
        local through = new_run(unpack(options))
        through:steps(1, 40)
        local first = new_run(unpack(options))
        first:steps(1, 20)
        first:save(folder, 20)
        qm.seed(99) -- whatever else happened since
        qm.rand({ 3 })
        local second = new_run(unpack(options))
        if options[1].kind == "dense" then second:steps(1, 3) end -- what is there is overwritten
        local state = second:load(folder)
        assert.equal(20, state.step)
        assert.equal(CONFIG.hidden_size, state.config.hidden_size)
        second:steps(21, 40)
        for step = 21, 40 do assert.equal(through.losses[step], second.losses[step], "step " .. step) end
        assert.is_true(through:bytes() == second:bytes())
        assert.is_true(second.losses[40] < second.losses[21] + 1)
      end)
    end)
  end

  it("keeps the last few, in the order they were written, whatever their steps", function()
    with_folder(function(folder)
      local run = new_run({ kind = "dense" })
      for _, step in ipairs({ 10, 20, 30, 15, 25 }) do run:save(folder, step, 2) end
      local steps = {}
      for i, found in ipairs(qm.checkpoints.list(folder)) do steps[i] = found.step end
      assert.same({ 15, 25 }, steps)
      assert.equal(folder .. "/000005-step-25", qm.checkpoints.latest(folder))
      assert.same({ "000004-step-15", "000005-step-25" }, files.list(folder))
    end)
  end)

  it("removes what a killed run left half written, and never loads it", function()
    with_folder(function(folder)
      local run = new_run({ kind = "dense" })
      run:save(folder, 1)
      files.make_folder(folder .. "/partial-000002-step-2")
      files.write(folder .. "/partial-000002-step-2/model.safetensors", "half")
      assert.equal(1, run:load(folder).step)
      run:save(folder, 3)
      assert.same({ "000001-step-1", "000002-step-3" }, files.list(folder))
    end)
  end)

  it("leaves a loadable checkpoint when killed while writing", function()
    with_folder(function(folder)
      local child = folder .. "-child.lua"
      files.write(child, ([[
        package.path = "./lua/?.lua;./lua/?/init.lua;" .. package.path
        local qm = require("quartermoon")
        local config = { vocab_size = 4096, hidden_size = 256, intermediate_size = 512, num_hidden_layers = 1,
          num_attention_heads = 4, max_position_embeddings = 16 }
        local model = qm.models.llama.new(config, { dtype = "f32", linear = { kind = "dense" } })
        for step = 1, 10000 do
          for _, param in ipairs(model:parameters()) do param:fill(step) end
          qm.checkpoints.save(%q, { step = step, model = model, keep = 2 })
        end]]):format(folder))
      local attempt, usual_delay = 0, 0.2
      while attempt < 5 do
        local delay = usual_delay * (0.75 + 0.5 * math.random())
        os.execute(("timeout -s KILL %.3f luajit %s 2>/dev/null"):format(delay, child))
        local newest = qm.checkpoints.latest(folder)
        assert.is_true(newest ~= nil or usual_delay < 30, "not one checkpoint in 30 seconds")
        -- On a busy machine a child may be killed before its first checkpoint is whole.
        if newest then attempt = attempt + 1 else usual_delay = 2 * usual_delay end
        for _, found in ipairs(qm.checkpoints.list(folder)) do assert_whole(found) end
      end
      os.remove(child)
      assert.is_truthy(qm.checkpoints.latest(folder))
    end)
  end)

  it("names the file where a list of groups is none", function()
    with_folder(function(folder)
      local path = new_run({ kind = "mpq" }):save(folder, 1)
      local state = files.read_json(path .. "/state.json")
      for _, saved in pairs(state.quantized) do saved.q_groups = { { 1 }, true } end
      files.write_json(path .. "/state.json", state)
      assert.error_matches(function() new_run({ kind = "mpq" }):load(path) end,
        "/state%.json: argument '[^']*%.q_groups': expected nil, got string 'table")
    end)
  end)

  it("changes nothing where the model fits and the optimizer does not", function()
    for _, kind in ipairs({ "dense", "mpq" }) do
      with_folder(function(folder)
        local path = new_run({ kind = kind }):save(folder, 1)
        local optim_path = path .. "/optim.safetensors"
        local run = new_run({ kind = kind })
        local weight = run.model.model.layers[1].mlp.up_proj.weight
        local tensor = kind == "mpq" and weight.data or weight
        qm.no_grad(tensor.fill, tensor, 3)
        local before, steps = tensor:bytes(), run.optim.steps
        local function expect(mistake)
          assert.error_matches(function() run:load(path) end, mistake, 1, true)
          assert.equal(before, tensor:bytes())
          assert.equal(steps, run.optim.steps)
        end
        qm.safetensors.save(optim_path, { ["nobody.exp_avg"] = qm.ones({ 2 }) })
        expect("expected tensors of this optimizer's parameters, got string 'nobody.exp_avg'")
        local name = run.optim.slots[1].name
        local two = qm.ones({ 2 })
        qm.safetensors.save(optim_path, { [name .. ".exp_avg"] = two, [name .. ".exp_avg_sq"] = two })
        expect("beside its pair, got qm.Tensor f32 [2]")
        qm.safetensors.save(optim_path, { [name .. ".momentum"] = qm.ones({ 2 }) })
        expect("no tensor '" .. name .. ".momentum'")
        local state = qm.files.read_json(path .. "/state.json")
        qm.safetensors.save(optim_path, {})
        state.default_rng.draws = -1
        files.write_json(path .. "/state.json", state)
        expect("argument 'default_rng.draws'")
      end)
    end
  end)

  it("says what does not fit, and changes nothing then", function()
    with_folder(function(folder)
      local run = new_run({ kind = "dense" })
      assert.error_matches(function() run:load(folder) end, "there is no checkpoint", 1, true)
      local path = run:save(folder, 1)
      local config = {}
      for key, value in pairs(CONFIG) do config[key] = value end
      config.intermediate_size = 96
      local other = qm.models.llama.new(config, { dtype = "f32", linear = { kind = "dense" } })
      local before = other.model.embed_tokens.weight:bytes()
      assert.error_matches(function() qm.checkpoints.load(path, { model = other }) end,
        "is f32 %[.*%] there, expected f32 %[")
      assert.equal(before, other.model.embed_tokens.weight:bytes())
      collectgarbage()
      collectgarbage("stop")
      local live = qm.handles_live()
      files.write(path .. "/state.json", '{"format": 1, "step": 1, "optim": {"slots": [3]}}')
      assert.error_matches(function() run:load(path) end, "expected a state of %d+ parameters, got number 1")
      files.write(path .. "/state.json", '{"format": 1, "step": 1, "quantized": 7}')
      assert.error_matches(function() run:load(path) end,
        "qm.checkpoints.load: " .. path .. "/state.json: argument 'quantized': expected a table, got number 7", 1, true)
      assert.equal(live, qm.handles_live()) -- what was read of the file is released
      collectgarbage("restart")
      files.write(path .. "/state.json", '{"format": 1, "step": -3}')
      assert.error_matches(function() run:load(path) end, "argument 'step': expected an integer of at least 0", 1, true)
      local other_numbers = { '{"format": [1], "step": 1}', '[]', '"x"', '{"format": 1, "step": 1, "optim": 3}',
        '{"format": 1, "step": 1, "optim": {"slots": {}}}' }
      for _, text in ipairs(other_numbers) do
        files.write(path .. "/state.json", text)
        assert.error_matches(function() run:load(path) end, "qm.checkpoints.load: " .. path .. "/", 1, true)
      end
      files.write(path .. "/state.json", '{"format": 1, "st')
      assert.error_matches(function() run:load(path) end, "state.json", 1, true)
    end)
  end)
end)
