"""Go's text/template with Ollama's data and functions: https://github.com/ollama/ollama/tree/main/template."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tune2gguf.tokenizer.conversation import Message

# .System has all system messages; .Messages and .Tools have Ollama's types; json is a function; properties and
# arguments are maps. .Items and .Enum are plain JSON.
PROGRAM = r"""
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type PropertyType []string

func (p *PropertyType) UnmarshalJSON(data []byte) error {
	var one string
	if json.Unmarshal(data, &one) == nil {
		*p = []string{one}
		return nil
	}
	var several []string
	err := json.Unmarshal(data, &several)
	*p = several
	return err
}

type ToolProperty struct {
	Type        PropertyType `json:"type,omitempty"`
	Items       any          `json:"items,omitempty"`
	Description string       `json:"description,omitempty"`
	Enum        []any        `json:"enum,omitempty"`
}

type Tool struct {
	Type     string `json:"type"`
	Function struct {
		Name        string `json:"name"`
		Description string `json:"description"`
		Parameters  struct {
			Type       string                  `json:"type"`
			Required   []string                `json:"required,omitempty"`
			Properties map[string]ToolProperty `json:"properties"`
		} `json:"parameters"`
	} `json:"function"`
}

type ToolCall struct {
	ID       string `json:"id"`
	Function struct {
		Name      string         `json:"name"`
		Arguments map[string]any `json:"arguments"`
	} `json:"function"`
}

type Message struct {
	Role       string     `json:"role"`
	Content    string     `json:"content"`
	ToolCalls  []ToolCall `json:"tool_calls"`
	ToolName   string     `json:"tool_name"`
	ToolCallID string     `json:"tool_call_id"`
}

type Tools []Tool

func main() {
	var input struct {
		Template string
		Requests []struct {
			Messages []*Message
			Tools    Tools
		}
	}
	if err := json.NewDecoder(os.Stdin).Decode(&input); err != nil {
		panic(err)
	}
	functions := template.FuncMap{"json": func(v any) string {
		b, _ := json.Marshal(v)
		return string(b)
	}}
	parsed, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(input.Template)
	if err != nil {
		panic(err)
	}
	rendered := []string{}
	for _, request := range input.Requests {
		system := []string{}
		for _, message := range request.Messages {
			if message.Role == "system" {
				system = append(system, message.Content)
			}
		}
		values := map[string]any{
			"Messages": request.Messages, "Tools": request.Tools, "Response": "",
			"System": strings.Join(system, "\n\n"),
		}
		var buffer bytes.Buffer
		if err := parsed.Execute(&buffer, values); err != nil {
			panic(err)
		}
		rendered = append(rendered, buffer.String())
	}
	json.NewEncoder(os.Stdout).Encode(rendered)
}
"""


def build_renderer(folder: Path) -> Path:
    """Compile the program and return its path."""
    (folder / "main.go").write_text(PROGRAM)
    (folder / "go.mod").write_text("module renderer\n\ngo 1.18\n")
    subprocess.run(["go", "build", "-o", "renderer", "."], cwd=folder, check=True)
    return folder / "renderer"


def render_requests(renderer: Path, template: str, requests: Sequence[dict[str, Any]]) -> list[str]:
    """Render requests to Ollama's API, each with `messages` and `tools`."""
    given = json.dumps({"Template": template, "Requests": list(requests)})
    return json.loads(subprocess.run([renderer], input=given, capture_output=True, text=True, check=True).stdout)


def render_messages(renderer: Path, template: str, prompts: Sequence[Sequence[Message]]) -> list[str]:
    """Render conversations without tools."""
    requests = [{"messages": [{"role": one.role, "content": one.content} for one in turns]} for turns in prompts]
    return render_requests(renderer, template, requests)
