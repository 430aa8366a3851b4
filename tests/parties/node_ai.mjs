// Vercel's AI SDK: objects, streamed objects, and tools: https://ai-sdk.dev/providers/openai-compatible-providers.
import assert from 'node:assert/strict';
import test from 'node:test';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateObject, generateText, Output, stepCountIs, streamObject, streamText, tool } from 'ai';
import { z } from 'zod';

const options = { name: 'shoal', baseURL: process.env.OPENAI_BASE_URL, apiKey: process.env.OPENAI_API_KEY };
const structured = createOpenAICompatible({ ...options, supportsStructuredOutputs: true })(process.env.SHOAL_MODEL);
const asked = { model: structured, prompt: 'What is the weather in Paris?', maxOutputTokens: 200, maxRetries: 0 };
const Weather = z.object({ city: z.enum(['Paris', 'Rome']), is_sunny: z.boolean() });
const tools = {
  get_weather: tool({
    description: 'The weather of a city.',
    inputSchema: z.object({ city: z.enum(['Paris', 'Rome']) }),
    execute: async ({ city }) => `It is sunny in ${city}.`,
  }),
};

test('generateObject', async () => {
  Weather.parse((await generateObject({ ...asked, schema: Weather })).object);
});

test('generateObject of a list and of a choice', async () => {
  const schema = z.object({ is_sunny: z.boolean() });
  assert.ok(Array.isArray((await generateObject({ ...asked, output: 'array', schema, maxOutputTokens: 4000 })).object));
  const choice = await generateObject({ ...asked, output: 'enum', enum: ['sunny', 'rainy'] });
  assert.ok(['sunny', 'rainy'].includes(choice.object));
});

test('streamObject', async () => {
  const stream = streamObject({ ...asked, schema: Weather });
  const parts = [];
  for await (const part of stream.partialObjectStream) parts.push(part);
  assert.deepEqual(parts.at(-1), Weather.parse(await stream.object));
});

test('generateText with an object as its output', async () => {
  const answer = await generateText({ ...asked, output: Output.object({ schema: Weather }) });
  Weather.parse(answer.output);
});

test('tools in several steps', async () => {
  const answer = await generateText({ ...asked, tools, toolChoice: 'required', stopWhen: stepCountIs(2) });
  assert.equal(answer.steps.length, 2);
  assert.match(answer.steps[0].toolResults[0].output, /^It is sunny in /);
});

test('a tool that is named, then an answer', async () => {
  const prepareStep = ({ stepNumber }) => ({
    toolChoice: stepNumber ? 'none' : { type: 'tool', toolName: 'get_weather' },
  });
  const answer = await generateText({ ...asked, tools, prepareStep, stopWhen: stepCountIs(3) });
  assert.equal(typeof answer.text, 'string');
});

test('streamed tools', async () => {
  const stream = streamText({ ...asked, tools, toolChoice: 'required', stopWhen: stepCountIs(2) });
  const types = new Set();
  for await (const part of stream.fullStream) {
    assert.notEqual(part.type, 'error', part.error);
    types.add(part.type);
  }
  assert.ok(types.has('tool-call') && types.has('tool-result'));
});

test('tools beside an object as the output', async () => {
  const output = Output.object({ schema: Weather });
  const answer = await generateText({ ...asked, tools, output, stopWhen: stepCountIs(4) });
  Weather.parse(answer.output);
});
