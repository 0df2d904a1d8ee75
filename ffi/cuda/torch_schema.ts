/** What a PyTorch operator takes and gives, from the text that it is registered with. */
import { FfiError } from "../errors.ts";

export interface OperatorArgument {
  readonly name: string;
  /** As the schema has it, without aliases: `"Tensor"`, `"int"`, `"float"`, `"bool"`, ... */
  readonly type: string;
  /** Whether it may be None. */
  readonly optional: boolean;
  /** As the schema writes it, e.g. `"None"`; undefined for what must be given. */
  readonly default: string | undefined;
}

export interface OperatorSchema {
  /** Without its namespace. */
  readonly name: string;
  readonly args: readonly OperatorArgument[];
  /** How many results it has. */
  readonly results: number;
}

/** `Tensor(out!)? out = None`: a type with an alias that does not matter here, `?`, a name, a default. */
const ARGUMENT = /^(\w+)(?:\([^)]*\))?(\?)? +(\w+)(?: *= *(\S+))?$/;

/**
 * Reads a schema such as `"fwd(Tensor q, float? scale = None) -> (Tensor, Tensor)"`.
 *
 * @throws {FfiError} for what this reader does not know: lists, keyword-only arguments
 */
export function parseSchema(text: string): OperatorSchema {
  const [, name, args, results] = /^([\w.]+)\((.*)\) *-> *(.+)$/s.exec(text) ?? refuse(text);
  return {
    name,
    args: splitAtCommas(args).map((argument) => {
      const [, type, optional, label, value] = ARGUMENT.exec(argument) ?? refuse(argument);
      return { name: label, type, optional: optional !== undefined, default: value };
    }),
    results: splitAtCommas(results.replace(/^\((.*)\)$/s, "$1")).length,
  };
}

/** The parts between the commas that stand in no parentheses. */
function splitAtCommas(text: string): string[] {
  return text.trim() === "" ? [] : text.split(/,(?![^(]*\))/).map((part) => part.trim());
}

function refuse(text: string): never {
  throw new FfiError(`PyTorch: cannot read this part of an operator's schema: ${text}`);
}

/** What an argument is when it is not given, as the 64 bits that the C shim takes. */
export function defaultBits({ name, type, optional, default: text }: OperatorArgument): bigint {
  if (optional && text === "None") return 0n;
  const bits = text === undefined || optional ? undefined : valueBits(type, text);
  if (bits === undefined) {
    throw new FfiError(`PyTorch: the operator takes an argument that has to be given: ${type} ${name}`);
  }
  return bits;
}

function valueBits(type: string, text: string): bigint | undefined {
  if (type === "bool") return text === "True" ? 1n : text === "False" ? 0n : undefined;
  if (type === "int" && /^-?\d+$/.test(text)) return BigInt.asUintN(64, BigInt(text));
  if (type === "float" && Number.isFinite(Number(text))) return doubleBits(Number(text));
  return undefined;
}

/** A number as C's double, by its bits. */
export function doubleBits(value: number): bigint {
  return new BigUint64Array(Float64Array.of(value).buffer)[0];
}
