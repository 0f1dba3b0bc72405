-- A target's inputs without a fuzzer: luajit spec/fuzz/replay.lua TARGET FOLDER FILE...
-- FOLDER is empty and takes the target's files. The first finding is printed, and the exit status is 1 then.
local target, folder = arg[1], arg[2]
local files, exit = {}, os.exit
for i = 3, #arg do
  local file = assert(io.open(arg[i], "rb"))
  files[i - 2] = { arg[i], file:read("*a") }
  file:close()
end
local run, findings = assert(loadfile("spec/fuzz/harness.lua"))(target, folder), 0
for _, file in ipairs(files) do
  local finding = run(file[2])
  if finding then
    print(("%s: %s"):format(file[1], finding))
    findings = 1
    break -- a finding stays the harness's answer
  end
end
print(("%d inputs"):format(#files))
exit(findings)
