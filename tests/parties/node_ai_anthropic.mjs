// Vercel's AI SDK with its provider of Anthropic's API: https://ai-sdk.dev/providers/ai-sdk-providers/anthropic.
import assert from 'node:assert/strict';
import test from 'node:test';
import { createAnthropic } from '@ai-sdk/anthropic';
import { generateObject, generateText, stepCountIs, streamText, tool } from 'ai';
import { z } from 'zod';

const provider = createAnthropic({ baseURL: `${process.env.ANTHROPIC_BASE_URL}/v1` });
const model = provider(process.env.SHOAL_MODEL);
const prompt = 'What is the weather in Paris?';
const City = z.object({ city: z.enum(['Paris', 'Rome']) });
const asked = { model, prompt, maxOutputTokens: 200, maxRetries: 0 };
const weather = tool({ description: 'The weather of a city.', inputSchema: City, execute: ({ city }) => `sunny in ${city}` });

test('a text', async () => {
  const { text, usage } = await generateText({ ...asked, system: 'Be brief.' });
  assert.equal(typeof text, 'string');
  assert.ok(usage.inputTokens > 0 && usage.outputTokens > 0);
});

test('a text in pieces', async () => {
  const pieces = [];
  const result = streamText(asked);
  for await (const piece of result.textStream) pieces.push(piece);
  assert.equal(pieces.join(''), await result.text);
});

test('an object', async () => {
  const { object } = await generateObject({ ...asked, schema: City });
  City.parse(object);
});

test('tools are called in several steps', async () => {
  let step = 0;
  const prepareStep = () => ({ toolChoice: step++ ? 'none' : 'required' });
  const { steps } = await generateText({ ...asked, tools: { weather }, prepareStep, stopWhen: stepCountIs(2) });
  assert.match(steps[0].toolResults[0].output, /^sunny in /);
  assert.equal(steps.length, 2);
});

test('a streamed call', async () => {
  const result = streamText({ ...asked, tools: { weather }, toolChoice: 'required' });
  await result.consumeStream();
  City.parse((await result.toolCalls)[0].input);
});
