// OpenAI's SDK for Node: parse, streamed tools, and runTools: https://github.com/openai/openai-node/blob/master/helpers.md.
import assert from 'node:assert/strict';
import test from 'node:test';
import OpenAI from 'openai';
import { zodFunction, zodResponseFormat, zodResponsesFunction, zodTextFormat } from 'openai/helpers/zod';
import { z } from 'zod';

const client = new OpenAI({ maxRetries: 0 });
const model = process.env.SHOAL_MODEL;
const messages = [{ role: 'user', content: 'What is the weather in Paris?' }];
const asked = { model, messages, max_tokens: 200 };
const City = z.object({ city: z.enum(['Paris', 'Rome']) });
const Weather = z.object({ city: z.enum(['Paris', 'Rome']), is_sunny: z.boolean() });

const getWeather = {
  type: 'function',
  function: {
    name: 'get_weather',
    description: 'The weather of a city.',
    parameters: z.toJSONSchema(City),
    parse: (text) => City.parse(JSON.parse(text)),
    function: ({ city }) => `It is sunny in ${city}.`,
  },
};

test('an answer is parsed', async () => {
  const answer = await client.chat.completions.parse({ ...asked, response_format: zodResponseFormat(Weather, 'weather') });
  Weather.parse(answer.choices[0].message.parsed);
});

test('a strict call is parsed', async () => {
  const tools = [zodFunction({ name: 'get_weather', parameters: City })];
  const answer = await client.chat.completions.parse({ ...asked, tools, tool_choice: 'required' });
  for (const call of answer.choices[0].message.tool_calls) City.parse(call.function.parsed_arguments);
});

test('a stream is put together', async () => {
  const tools = [zodFunction({ name: 'get_weather', parameters: City })];
  const pieces = [];
  const stream = client.chat.completions.stream({ ...asked, tools, tool_choice: 'required' });
  stream.on('tool_calls.function.arguments.delta', (event) => pieces.push(event.arguments_delta));
  const answer = await stream.finalChatCompletion();
  const calls = answer.choices[0].message.tool_calls;
  assert.equal(pieces.join(''), calls.map((call) => call.function.arguments).join(''));
  assert.equal(answer.choices[0].finish_reason, 'tool_calls');
});

test('runTools calls and reads results', async () => {
  const tool_choice = { type: 'function', function: { name: 'get_weather' } };
  const runner = client.chat.completions.runTools({ ...asked, tools: [getWeather], tool_choice });
  const results = [];
  runner.on('functionToolCallResult', (result) => results.push(result));
  await runner.done();
  assert.match(results[0], /^It is sunny in /);
});

test('runTools in several turns', async () => {
  const ended = { ...asked, stop: ['.', '\n'] }; // the client takes an answer that is cut for an error
  const runner = client.chat.completions.runTools({ ...ended, tools: [getWeather] }, { maxChatCompletions: 3 });
  assert.equal(typeof (await runner.finalContent()), 'string');
});

test('runTools as a stream', async () => {
  const tool_choice = { type: 'function', function: { name: 'get_weather' } };
  const runner = client.chat.completions.runTools({ ...asked, tools: [getWeather], tool_choice, stream: true });
  await runner.done();
  assert.equal(runner.messages.at(-1).role, 'tool');
});

test('an answer is sent back as it came', async () => {
  const tools = [zodFunction({ name: 'get_weather', parameters: City })];
  const answer = await client.chat.completions.create({ ...asked, tools, tool_choice: 'required' });
  const { message } = answer.choices[0];
  const results = message.tool_calls.map((call) => ({ role: 'tool', tool_call_id: call.id, content: 'sunny' }));
  const second = await client.chat.completions.create({ ...asked, messages: [...messages, message, ...results], tools });
  assert.equal(second.choices[0].message.role, 'assistant');
});

test('a response is parsed', async () => {
  const text = { format: zodTextFormat(Weather, 'weather') };
  const response = await client.responses.parse({ model, input: 'What is the weather in Paris?', text });
  Weather.parse(response.output_parsed);
});

test('a streamed response is put together, and goes on', async () => {
  const tools = [zodResponsesFunction({ name: 'get_weather', parameters: City })];
  const stream = client.responses.stream({ model, input: 'How is Paris?', tools, tool_choice: 'required' });
  const pieces = [];
  stream.on('response.function_call_arguments.delta', (event) => pieces.push(event.delta));
  const first = await stream.finalResponse();
  const calls = first.output.filter((item) => item.type === 'function_call');
  assert.equal(pieces.join(''), calls.map((call) => call.arguments).join(''));
  for (const call of calls) City.parse(call.parsed_arguments);
  const input = calls.map((call) => ({ type: 'function_call_output', call_id: call.call_id, output: 'sunny' }));
  const second = await client.responses.create({ model, input, tools, previous_response_id: first.id, max_output_tokens: 50 });
  assert.equal(second.previous_response_id, first.id);
});

test('a response in the background is read on', async () => {
  const how = { model, input: 'Say something.', background: true, max_output_tokens: 50, stream: true };
  const seen = [];
  let id;
  for await (const event of await client.responses.create(how)) {
    id ??= event.response.id;
    seen.push(event.type);
    if (seen.length === 5) break;
  }
  for await (const event of await client.responses.retrieve(id, { stream: true, starting_after: 4 })) seen.push(event.type);
  assert.match(seen.at(-1), /^response\.(completed|incomplete)$/);
  assert.equal(seen[0], 'response.created');
});

test('vectors, in base64 unless told otherwise', async () => {
  const input = ['import os', 'def add(a, b):'];
  const answer = await client.embeddings.create({ model: asked.model, input });
  const floats = await client.embeddings.create({ model: asked.model, input, encoding_format: 'float' });
  assert.deepEqual(answer.data.map((one) => one.embedding), floats.data.map((one) => one.embedding));
  assert.equal(answer.data.length, 2);
});
