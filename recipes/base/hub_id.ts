/** Whether a text can be a model's id on the hub: `owner/name`. */
export function isHubId(text: string): boolean {
  return /^\w[\w.-]*\/\w[\w.-]*$/.test(text) && !/\.\.|--/.test(text) && !text.endsWith(".git");
}
