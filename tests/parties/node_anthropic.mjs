// Anthropic's SDK for Node: messages, streams, tools and parsed answers: https://github.com/anthropics/anthropic-sdk-typescript.
import assert from 'node:assert/strict';
import test from 'node:test';
import Anthropic from '@anthropic-ai/sdk';
import { zodOutputFormat } from '@anthropic-ai/sdk/helpers/zod';
import { z } from 'zod';

const client = new Anthropic({ maxRetries: 0 });
const model = process.env.SHOAL_MODEL;
const messages = [{ role: 'user', content: 'What is the weather in Paris?' }];
const asked = { model, messages, max_tokens: 200 };
const tools = [
  {
    name: 'get_weather',
    description: 'The weather of a city.',
    input_schema: { type: 'object', properties: { city: { type: 'string', enum: ['Paris', 'Rome'] } }, required: ['city'] },
  },
];
const tool_choice = { type: 'any', disable_parallel_tool_use: true };

test('a message', async () => {
  const message = await client.messages.create({ ...asked, system: [{ type: 'text', text: 'Be brief.' }] });
  assert.equal(message.type, 'message');
  assert.ok(['end_turn', 'max_tokens'].includes(message.stop_reason));
  assert.ok(message.usage.input_tokens > 0 && message._request_id);
});

test('a stream is put together', async () => {
  const texts = [];
  const stream = client.messages.stream(asked).on('text', (text) => texts.push(text));
  const message = await stream.finalMessage();
  assert.equal(texts.join(''), message.content.map((block) => block.text).join(''));
  assert.ok(message.usage.output_tokens > 0);
});

test('a stream as it comes', async () => {
  const names = [];
  for await (const event of await client.messages.create({ ...asked, stream: true })) names.push(event.type);
  assert.equal(names[0], 'message_start');
  assert.deepEqual(names.slice(-2), ['message_delta', 'message_stop']);
});

test('a streamed call and a second turn', async () => {
  const pieces = [];
  const stream = client.messages.stream({ ...asked, tools, tool_choice });
  stream.on('inputJson', (piece) => pieces.push(piece));
  const message = await stream.finalMessage();
  const [call] = message.content;
  assert.equal(message.stop_reason, 'tool_use');
  assert.deepEqual(JSON.parse(pieces.join('')), call.input);
  const result = { role: 'user', content: [{ type: 'tool_result', tool_use_id: call.id, content: 'sunny' }] };
  const turns = [...messages, { role: 'assistant', content: message.content }, result];
  const second = await client.messages.create({ ...asked, messages: turns, tools });
  assert.equal(second.role, 'assistant');
});

test('an answer is parsed', async () => {
  const Weather = z.object({ city: z.enum(['Paris', 'Rome']), is_sunny: z.boolean() });
  const output_config = { format: zodOutputFormat(Weather) };
  const message = await client.messages.parse({ ...asked, output_config });
  Weather.parse(message.parsed_output);
});

test('tokens are counted', async () => {
  const { input_tokens } = await client.messages.countTokens({ model, messages, tools });
  const { usage } = await client.messages.create({ model, messages, tools, max_tokens: 1 });
  assert.equal(input_tokens, usage.input_tokens + usage.cache_read_input_tokens);
});

test('errors have types', async () => {
  await assert.rejects(client.messages.create({ ...asked, model: 'nobody' }), Anthropic.NotFoundError);
  const image = { type: 'image', source: { type: 'base64', media_type: 'image/png', data: 'AA==' } };
  const shown = [{ role: 'user', content: [image] }];
  await assert.rejects(client.messages.create({ ...asked, messages: shown }), /messages\[0\]\.content\[0\]\.type: 'image'/);
});
