"""OpenAI's Responses API over chats: items become messages, and what a chat says becomes items and events."""
