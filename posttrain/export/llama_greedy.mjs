// Greedy continuations and log-probabilities of token prompts in llama.cpp: JSON on stdin, JSON on stdout.
// in:  {"module": path of node-llama-cpp's entry, "model": GGUF path, "prompts": [[id]], "new_tokens": n,
//       "positions": n, "texts": [text], "threads": n, "adapter": GGUF path or null}
// out: {"greedy": [[id]], "logprobs": [[number]], "tokens": [[id]], "version": llama.cpp release};
//      logprobs are of each prompt's own tokens, as its last n positions foretell them
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

// The sampler's settings that leave every token in the distribution.
const UNCHANGED = {temperature: 1, topK: 0, topP: 1, minP: 0};
// The end-of-generation tokens are tokens like any other here: both programs go on past them.
const greedy = [];
const logprobs = [];
for (const prompt of input.prompts) {
    await sequence.clearHistory();
    const written = [];
    const scores = [];
    let feed = prompt;
    while (written.length < input.new_tokens) {
        const scored = (index) => feed === prompt && index >= prompt.length - input.positions;
        const items = feed.map((token, index) => {
            if (index === feed.length - 1) return [token, {generateNext: {token: true, options: {temperature: 0}}}];
            const filter = {tokens: [feed[index + 1]], includeTop: 1};
            return scored(index) ? [token, {generateNext: {logits: {filter}, totalLogitWeight: true, options: UNCHANGED}}] : token;
        });
        const result = await sequence.controlledEvaluate(items);
        for (let index = 0; index < feed.length - 1; index++) {
            if (!scored(index)) continue;
            const {logits, totalLogitWeight} = result[index].next;
            scores.push(logits.get(feed[index + 1]) - Math.max(...logits.values()) - Math.log(totalLogitWeight));
        }
        const token = result[feed.length - 1].next.token;
        written.push(token);
        feed = [token];
    }
    greedy.push(written);
    logprobs.push(scores);
}
const tokens = input.texts.map((text) => model.tokenize(text, false));
writeSync(1, JSON.stringify({greedy, logprobs, tokens, version: llama.llamaCppRelease?.release ?? null}) + "\n");
process.exit(0);
