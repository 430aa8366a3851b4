// Vercel's AI SDK with its openai provider, whose default is the Responses API: https://ai-sdk.dev/providers/ai-sdk-providers/openai.
import assert from 'node:assert/strict';
import test from 'node:test';
import { createOpenAI } from '@ai-sdk/openai';
import { generateObject, generateText, Output, stepCountIs, streamObject, streamText, tool } from 'ai';
import { z } from 'zod';

const openai = createOpenAI({ baseURL: process.env.OPENAI_BASE_URL, apiKey: process.env.OPENAI_API_KEY });
const model = openai(process.env.SHOAL_MODEL);
const asked = { model, prompt: 'What is the weather in Paris?', maxOutputTokens: 200, maxRetries: 0 };
const Weather = z.object({ city: z.enum(['Paris', 'Rome']), is_sunny: z.boolean() });
const tools = {
  get_weather: tool({
    description: 'The weather of a city.',
    inputSchema: z.object({ city: z.enum(['Paris', 'Rome']) }),
    execute: async ({ city }) => `It is sunny in ${city}.`,
  }),
};

test('generateText with a system message', async () => {
  const answer = await generateText({ ...asked, system: 'Be brief.' });
  assert.equal(typeof answer.text, 'string');
  assert.match(answer.providerMetadata.openai.responseId, /^resp_/);
  assert.ok(answer.usage.inputTokens > 0 && answer.usage.outputTokens > 0);
});

test('generateObject', async () => {
  Weather.parse((await generateObject({ ...asked, schema: Weather })).object);
});

test('streamObject', async () => {
  const stream = streamObject({ ...asked, schema: Weather });
  const parts = [];
  for await (const part of stream.partialObjectStream) parts.push(part);
  assert.deepEqual(parts.at(-1), Weather.parse(await stream.object));
});

test('tools in several steps, which refer to the items of those before', async () => {
  const answer = await generateText({ ...asked, tools, toolChoice: 'required', stopWhen: stepCountIs(2) });
  assert.equal(answer.steps.length, 2);
  assert.match(answer.steps[0].toolResults[0].output, /^It is sunny in /);
});

test('tools in several steps of which nothing is kept', async () => {
  const providerOptions = { openai: { store: false } };
  const how = { ...asked, tools, toolChoice: 'required', stopWhen: stepCountIs(2), providerOptions };
  assert.equal((await generateText(how)).steps.length, 2);
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

test('the next turn goes on with the response before', async () => {
  const first = await generateText(asked);
  const previousResponseId = first.providerMetadata.openai.responseId;
  const second = await generateText({ ...asked, prompt: 'And in Rome?', providerOptions: { openai: { previousResponseId } } });
  assert.ok(second.usage.inputTokens > first.usage.inputTokens);
});

test('the next turn has the messages', async () => {
  const messages = [{ role: 'user', content: asked.prompt }];
  const first = await generateText({ ...asked, prompt: undefined, messages, tools, toolChoice: 'required' });
  const next = [...messages, ...first.response.messages, { role: 'user', content: 'And in Rome?' }];
  const second = await generateText({ ...asked, prompt: undefined, messages: next, tools, toolChoice: 'none' });
  assert.equal(typeof second.text, 'string');
});

test('tools beside an object as the output', async () => {
  const output = Output.object({ schema: Weather });
  const answer = await generateText({ ...asked, tools, output, stopWhen: stepCountIs(4) });
  Weather.parse(answer.output);
});
