/**
 * A JSON reader that keeps what JSON.parse throws away: duplicate keys are an error, objects are Maps (so that no key
 * can touch a prototype), and numbers keep their text (so that 1.0, 1e2 and 2^53+1 can be told from safe integers).
 * Grammar: RFC 8259. For headers of untrusted files; depth is limited, so no input overflows the stack.
 */

/** A number as it is spelled in the text. */
export class JsonNumber {
  constructor(readonly text: string) {}
}

/** A JSON value as {@link parseStrictJson} returns it. */
export type StrictJson = null | boolean | string | JsonNumber | StrictJson[] | Map<string, StrictJson>;

/** Why a text was refused, and where. */
export class StrictJsonError extends Error {
  override readonly name = "StrictJsonError";

  constructor(
    message: string,
    /** Character offset in the text. */
    readonly position: number,
    /** The key that occurs twice, when that is the reason. */
    readonly duplicateKey?: string,
  ) {
    super(message);
  }
}

const ESCAPES: Readonly<Record<string, string>> = {
  '"': '"',
  "\\": "\\",
  "/": "/",
  b: "\b",
  f: "\f",
  n: "\n",
  r: "\r",
  t: "\t",
};

/**
 * Parses one JSON value with nothing but JSON's whitespace around it.
 *
 * @param maxDepth how deep arrays and objects may nest
 * @throws {StrictJsonError} at the first character that does not fit, at a duplicate key (compared after escapes are
 *   decoded), at an unpaired surrogate escape, and below `maxDepth`
 */
export function parseStrictJson(text: string, maxDepth = 16): StrictJson {
  let at = 0;

  const fail = (what: string): never => {
    throw new StrictJsonError(`${what} at character ${at}`, at);
  };

  const skipSpace = () => {
    while (at < text.length) {
      const code = text.charCodeAt(at);
      if (code !== 0x20 && code !== 0x0a && code !== 0x0d && code !== 0x09) return;
      at++;
    }
  };

  const readString = (): string => {
    at++; // the opening quote
    let value = "";
    let start = at;
    while (true) {
      if (at >= text.length) fail("unfinished string");
      const code = text.charCodeAt(at);
      if (code === 0x22) break;
      if (code < 0x20) fail("control character in a string");
      if (code !== 0x5c) {
        at++;
        continue;
      }
      value += text.slice(start, at);
      const escape = text[at + 1];
      if (escape === "u") {
        const digits = text.slice(at + 2, at + 6);
        if (!/^[0-9a-fA-F]{4}$/.test(digits)) fail("bad \\u escape");
        value += String.fromCharCode(parseInt(digits, 16));
        at += 6;
      } else {
        const plain = escape === undefined ? undefined : ESCAPES[escape];
        if (plain === undefined) fail("bad escape");
        value += plain;
        at += 2;
      }
      start = at;
    }
    value += text.slice(start, at);
    // Half a surrogate pair is no text: it would turn into U+FFFD when it is written, and two names into one.
    if (!value.isWellFormed()) fail("unpaired surrogate in the string that ends");
    at++; // the closing quote
    return value;
  };

  const readNumber = (): JsonNumber => {
    const number = /-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?/y;
    number.lastIndex = at;
    const match = number.exec(text);
    if (match === null) return fail("bad number");
    at += match[0].length;
    return new JsonNumber(match[0]);
  };

  const readWord = (word: string, value: boolean | null): boolean | null => {
    if (!text.startsWith(word, at)) fail("unexpected character");
    at += word.length;
    return value;
  };

  const readArray = (depth: number): StrictJson[] => {
    const values: StrictJson[] = [];
    at++;
    skipSpace();
    if (text[at] === "]") {
      at++;
      return values;
    }
    while (true) {
      values.push(readValue(depth));
      skipSpace();
      const next = text[at];
      if (next !== "," && next !== "]") fail("expected , or ] but found something else");
      at++;
      if (next === "]") return values;
    }
  };

  const readObject = (depth: number): Map<string, StrictJson> => {
    const entries = new Map<string, StrictJson>();
    at++;
    skipSpace();
    if (text[at] === "}") {
      at++;
      return entries;
    }
    while (true) {
      skipSpace();
      if (text[at] !== '"') fail("expected a key in quotes");
      const keyAt = at;
      const key = readString();
      if (entries.has(key)) throw new StrictJsonError(`duplicate key at character ${keyAt}`, keyAt, key);
      skipSpace();
      if (text[at] !== ":") fail("expected : after a key");
      at++;
      entries.set(key, readValue(depth));
      skipSpace();
      const next = text[at];
      if (next !== "," && next !== "}") fail("expected , or } but found something else");
      at++;
      if (next === "}") return entries;
    }
  };

  const readValue = (depth: number): StrictJson => {
    skipSpace();
    const first = text[at];
    if ((first === "{" || first === "[") && depth >= maxDepth) fail(`nested deeper than ${maxDepth}`);
    switch (first) {
      case "{":
        return readObject(depth + 1);
      case "[":
        return readArray(depth + 1);
      case '"':
        return readString();
      case "t":
        return readWord("true", true);
      case "f":
        return readWord("false", false);
      case "n":
        return readWord("null", null);
      case undefined:
        return fail("unexpected end");
      default:
        return readNumber();
    }
  };

  const value = readValue(0);
  skipSpace();
  if (at < text.length) fail("something other than whitespace after the value");
  return value;
}
