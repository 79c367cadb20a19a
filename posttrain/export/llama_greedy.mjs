// Greedy continuations of token prompts in llama.cpp: JSON on stdin, JSON on stdout.
// in:  {"module": path of node-llama-cpp's entry, "model": GGUF path, "prompts": [[id]], "new_tokens": n,
//       "texts": [text], "threads": n, "adapter": GGUF path or null}
// out: {"greedy": [[id]], "tokens": [[id]], "version": llama.cpp release}
import {readFileSync, writeSync} from "node:fs";
import {pathToFileURL} from "node:url";

const input = JSON.parse(readFileSync(0, "utf8"));
const {getLlama} = await import(pathToFileURL(input.module).href);
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, logLevel: "error", maxThreads: input.threads});
const model = await llama.loadModel({modelPath: input.model, gpuLayers: 0});
const longest = Math.max(1, ...input.prompts.map((prompt) => prompt.length));
const context = await model.createContext({
    contextSize: longest + input.new_tokens + 8, batchSize: longest + 8, sequences: 1, threads: input.threads,
    flashAttention: false, experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
    swaFullCache: true, ...(input.adapter ? {lora: {adapters: [{filePath: input.adapter, scale: 1}]}} : {})
});
const sequence = context.getSequence();

// The end-of-generation tokens are tokens like any other here: both programs go on past them.
const greedy = [];
for (const prompt of input.prompts) {
    await sequence.clearHistory();
    const written = [];
    let feed = prompt;
    while (written.length < input.new_tokens) {
        const items = [...feed.slice(0, -1), [feed.at(-1), {generateNext: {token: true, options: {temperature: 0}}}]];
        const result = await sequence.controlledEvaluate(items);
        const token = result[feed.length - 1].next.token;
        written.push(token);
        feed = [token];
    }
    greedy.push(written);
}
const tokens = input.texts.map((text) => model.tokenize(text, false));
writeSync(1, JSON.stringify({greedy, tokens, version: llama.llamaCppRelease?.release ?? null}) + "\n");
process.exit(0);
